/* The part of libucp's public binary interface that the shim uses, declared here since UCX installs often lack headers.

   Structures carry a field mask, so later versions only append: what is declared here holds from UCX 1.13 on.
   tests/unit/kvtransfer/test_ucx_abi.py compares sizes, offsets and constants with UCX's own headers where those are installed. */

#ifndef DIPTYCH_UCP_ABI_H
#define DIPTYCH_UCP_ABI_H

#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>

typedef int8_t ucs_status_t;
typedef void *ucs_status_ptr_t;
enum { UCS_OK = 0, UCS_INPROGRESS = 1, UCS_ERR_IO_ERROR = -3, UCS_ERR_NO_MEMORY = -4, UCS_ERR_LAST = -100 };
#define UCS_PTR_IS_ERR(ptr) ((uintptr_t)(ptr) >= (uintptr_t)UCS_ERR_LAST)
#define UCS_PTR_IS_PTR(ptr) ((uintptr_t)(ptr) - 1 < (uintptr_t)UCS_ERR_LAST - 1)
#define UCS_PTR_STATUS(ptr) ((ucs_status_t)(intptr_t)(ptr))

typedef struct ucp_context *ucp_context_h;
typedef struct ucp_config ucp_config_t;
typedef struct ucp_worker *ucp_worker_h;
typedef struct ucp_ep *ucp_ep_h;
typedef struct ucp_mem *ucp_mem_h;
typedef struct ucp_rkey *ucp_rkey_h;
typedef struct ucp_address ucp_address_t;

enum { UCP_PARAM_FIELD_FEATURES = 1 << 0 };
enum { UCP_FEATURE_RMA = 1 << 1, UCP_FEATURE_WAKEUP = 1 << 4, UCP_FEATURE_AM = 1 << 6 };
typedef struct ucp_params {
    uint64_t field_mask;
    uint64_t features;
    size_t request_size;
    void (*request_init)(void *request);
    void (*request_cleanup)(void *request);
    uint64_t tag_sender_mask;
    int mt_workers_shared;
    size_t estimated_num_eps;
    size_t estimated_num_ppn;
    const char *name;
} ucp_params_t;

enum { UCP_ATTR_FIELD_MEMORY_TYPES = 1 << 2 };
typedef struct ucp_context_attr {
    uint64_t field_mask;
    size_t request_size;
    int thread_mode;
    uint64_t memory_types;
    char name[32];
    size_t device_counter_size;
} ucp_context_attr_t;

enum { UCP_WORKER_PARAM_FIELD_THREAD_MODE = 1 << 0, UCP_WORKER_PARAM_FIELD_FLAGS = 1 << 5 };
enum { UCP_WORKER_FLAG_IGNORE_REQUEST_LEAK = 1 << 0 };
enum { UCS_THREAD_MODE_SERIALIZED = 1 };
typedef struct ucp_worker_params {
    uint64_t field_mask;
    int thread_mode;
    unsigned long cpu_mask[1024 / (8 * sizeof(unsigned long))];
    unsigned events;
    void *user_data;
    int event_fd;
    uint64_t flags;
    const char *name;
    size_t am_alignment;
    uint64_t client_id;
} ucp_worker_params_t;

enum { UCP_WORKER_ATTR_FIELD_ADDRESS = 1 << 1 };
typedef struct ucp_worker_attr {
    uint64_t field_mask;
    int thread_mode;
    uint32_t address_flags;
    ucp_address_t *address;
    size_t address_length;
    size_t max_am_header;
    char name[32];
    size_t max_debug_string;
} ucp_worker_attr_t;

enum { UCP_MEM_MAP_PARAM_FIELD_ADDRESS = 1 << 0, UCP_MEM_MAP_PARAM_FIELD_LENGTH = 1 << 1, UCP_MEM_MAP_PARAM_FIELD_FLAGS = 1 << 2 };
enum { UCP_MEM_MAP_PARAM_FIELD_MEMORY_TYPE = 1 << 4 };
enum { UCP_MEM_MAP_ALLOCATE = 1 << 1 };
enum { UCS_MEMORY_TYPE_HOST = 0, UCS_MEMORY_TYPE_CUDA = 1 };
typedef struct ucp_mem_map_params {
    uint64_t field_mask;
    void *address;
    size_t length;
    unsigned flags;
    unsigned prot;
    int memory_type;
    const void *exported_memh_buffer;
} ucp_mem_map_params_t;

enum { UCP_MEM_ATTR_FIELD_ADDRESS = 1 << 0 };
typedef struct ucp_mem_attr {
    uint64_t field_mask;
    void *address;
    size_t length;
    int mem_type;
} ucp_mem_attr_t;

enum { UCP_EP_PARAM_FIELD_REMOTE_ADDRESS = 1 << 0, UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE = 1 << 1, UCP_EP_PARAM_FIELD_ERR_HANDLER = 1 << 2 };
enum { UCP_ERR_HANDLING_MODE_PEER = 1 };
typedef void (*ucp_err_handler_cb_t)(void *arg, ucp_ep_h ep, ucs_status_t status);
typedef struct ucp_ep_params {
    uint64_t field_mask;
    const ucp_address_t *address;
    int err_mode;
    struct {
        ucp_err_handler_cb_t cb;
        void *arg;
    } err_handler;
    void *user_data;
    unsigned flags;
    struct {
        const struct sockaddr *addr;
        socklen_t addrlen;
    } sockaddr;
    void *conn_request;
    const char *name;
    struct {
        const struct sockaddr *addr;
        socklen_t addrlen;
    } local_sockaddr;
} ucp_ep_params_t;

enum { UCP_EP_ATTR_FIELD_TRANSPORTS = 1 << 3 };
typedef struct {
    const char *transport_name;
    const char *device_name;
} ucp_transport_entry_t;
typedef struct ucp_ep_attr {
    uint64_t field_mask;
    char name[32];
    struct sockaddr_storage local_sockaddr;
    struct sockaddr_storage remote_sockaddr;
    struct {
        ucp_transport_entry_t *entries;
        unsigned num_entries;
        size_t entry_size;
    } transports;
    void *user_data;
} ucp_ep_attr_t;

enum { UCP_OP_ATTR_FIELD_CALLBACK = 1 << 1, UCP_OP_ATTR_FIELD_USER_DATA = 1 << 2, UCP_OP_ATTR_FIELD_FLAGS = 1 << 4 };
enum { UCP_OP_ATTR_FIELD_MEMORY_TYPE = 1 << 6, UCP_OP_ATTR_FIELD_MEMH = 1 << 8 };    /* 1.13 skips MEMH, which came with 1.14 */
enum { UCP_EP_CLOSE_FLAG_FORCE = 1 << 0, UCP_AM_SEND_FLAG_EAGER = 1 << 1 };
typedef void (*ucp_send_nbx_callback_t)(void *request, ucs_status_t status, void *user_data);
typedef struct {
    uint32_t op_attr_mask;
    uint32_t flags;
    void *request;
    union {
        ucp_send_nbx_callback_t send;
    } cb;
    uint64_t datatype;
    void *user_data;
    void *reply_buffer;
    int memory_type;
    void *recv_info;
    ucp_mem_h memh;
} ucp_request_param_t;

enum { UCP_AM_HANDLER_PARAM_FIELD_ID = 1 << 0, UCP_AM_HANDLER_PARAM_FIELD_CB = 1 << 2, UCP_AM_HANDLER_PARAM_FIELD_ARG = 1 << 3 };
enum { UCP_AM_RECV_ATTR_FLAG_RNDV = 1 << 17 };
typedef struct ucp_am_recv_param {
    uint64_t recv_attr;
    ucp_ep_h reply_ep;
} ucp_am_recv_param_t;
typedef ucs_status_t (*ucp_am_recv_callback_t)(
    void *arg, const void *header, size_t header_length, void *data, size_t length, const ucp_am_recv_param_t *param);
typedef struct ucp_am_handler_param {
    uint64_t field_mask;
    unsigned id;
    uint32_t flags;
    ucp_am_recv_callback_t cb;
    void *arg;
} ucp_am_handler_param_t;

/* name, what it returns, what it takes; the shim resolves each by name */
#define UCP_FUNCTIONS(X)                                                                                                              \
    X(ucp_get_version_string, const char *, (void))                                                                                   \
    X(ucs_status_string, const char *, (ucs_status_t status))                                                                         \
    X(ucp_config_read, ucs_status_t, (const char *prefix, const char *file, ucp_config_t **config))                                   \
    X(ucp_config_modify, ucs_status_t, (ucp_config_t * config, const char *name, const char *value))                                  \
    X(ucp_config_release, void, (ucp_config_t * config))                                                                              \
    X(ucp_init_version, ucs_status_t,                                                                                                 \
      (unsigned major, unsigned minor, const ucp_params_t *params, const ucp_config_t *config, ucp_context_h *context))               \
    X(ucp_cleanup, void, (ucp_context_h context))                                                                                     \
    X(ucp_context_query, ucs_status_t, (ucp_context_h context, ucp_context_attr_t * attr))                                            \
    X(ucp_worker_create, ucs_status_t, (ucp_context_h context, const ucp_worker_params_t *params, ucp_worker_h *worker))              \
    X(ucp_worker_query, ucs_status_t, (ucp_worker_h worker, ucp_worker_attr_t *attr))                                                 \
    X(ucp_worker_release_address, void, (ucp_worker_h worker, ucp_address_t *address))                                                \
    X(ucp_worker_destroy, void, (ucp_worker_h worker))                                                                                \
    X(ucp_worker_progress, unsigned, (ucp_worker_h worker))                                                                           \
    X(ucp_worker_get_efd, ucs_status_t, (ucp_worker_h worker, int *fd))                                                               \
    X(ucp_worker_arm, ucs_status_t, (ucp_worker_h worker))                                                                            \
    X(ucp_worker_set_am_recv_handler, ucs_status_t, (ucp_worker_h worker, const ucp_am_handler_param_t *param))                       \
    X(ucp_mem_map, ucs_status_t, (ucp_context_h context, const ucp_mem_map_params_t *params, ucp_mem_h *memory))                      \
    X(ucp_mem_query, ucs_status_t, (ucp_mem_h memory, ucp_mem_attr_t * attr))                                                         \
    X(ucp_mem_unmap, ucs_status_t, (ucp_context_h context, ucp_mem_h memory))                                                         \
    X(ucp_rkey_pack, ucs_status_t, (ucp_context_h context, ucp_mem_h memory, void **buffer, size_t *num_bytes))                       \
    X(ucp_rkey_buffer_release, void, (void *buffer))                                                                                  \
    X(ucp_ep_rkey_unpack, ucs_status_t, (ucp_ep_h ep, const void *buffer, ucp_rkey_h *rkey))                                          \
    X(ucp_rkey_destroy, void, (ucp_rkey_h rkey))                                                                                      \
    X(ucp_ep_create, ucs_status_t, (ucp_worker_h worker, const ucp_ep_params_t *params, ucp_ep_h *ep))                                \
    X(ucp_ep_query, ucs_status_t, (ucp_ep_h ep, ucp_ep_attr_t *attr))                                                                 \
    X(ucp_ep_close_nbx, ucs_status_ptr_t, (ucp_ep_h ep, const ucp_request_param_t *param))                                            \
    X(ucp_ep_flush_nbx, ucs_status_ptr_t, (ucp_ep_h ep, const ucp_request_param_t *param))                                            \
    X(ucp_put_nbx, ucs_status_ptr_t,                                                                                                  \
      (ucp_ep_h ep, const void *buffer, size_t count, uint64_t remote_address, ucp_rkey_h rkey, const ucp_request_param_t *param))    \
    X(ucp_am_send_nbx, ucs_status_ptr_t,                                                                                              \
      (ucp_ep_h ep, unsigned id, const void *header, size_t header_length, const void *buffer, size_t count,                          \
       const ucp_request_param_t *param))                                                                                             \
    X(ucp_request_check_status, ucs_status_t, (void *request))                                                                        \
    X(ucp_request_free, void, (void *request))

#endif
