/* Opening and freeing: libucp found and resolved, the context, the pool's memory.

   dx_open ─► dx_allocate | dx_register ─► dx_start ─► … ─► dx_close;  dx_release by each holder: the last frees pool and context. */

#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "shim.h"

enum { API_MAJOR = 1, API_MINOR = 13 };

struct ucp_functions ucp;

static int resolve(const char *library, char *text)
{
    void *handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);
    if (handle == NULL)
        return say(text, DX_FAILED, library, dlerror());
#define X(name, result, arguments)                                       \
    if ((*(void **)&ucp.name = dlsym(handle, #name)) == NULL)            \
        return say(text, DX_FAILED, library, "has no " #name);
    UCP_FUNCTIONS(X)
#undef X
    return DX_OK;
}

/* `settings`: NAME=VALUE, each ended by a newline; names that this UCX does not know are passed over. */
static ucs_status_t configure(ucp_config_t *config, const char *settings)
{
    char *all = strdup(settings), *rest = all;
    if (all == NULL)
        return UCS_ERR_NO_MEMORY;
    for (char *name; (name = strsep(&rest, "\n")) != NULL;) {
        char *value = strchr(name, '=');
        if (value != NULL) {
            *value++ = '\0';
            ucp.ucp_config_modify(config, name, value);
        }
    }
    free(all);
    return UCS_OK;
}

static ucs_status_t open_context(ucp_context_h *context, uint64_t features, const char *settings)
{
    ucp_config_t *config;
    ucp_params_t params = {.field_mask = UCP_PARAM_FIELD_FEATURES, .features = features};
    ucs_status_t status = ucp.ucp_config_read(NULL, NULL, &config);
    if (status != UCS_OK)
        return status;
    status = configure(config, settings);
    if (status == UCS_OK)
        status = ucp.ucp_init_version(API_MAJOR, API_MINOR, &params, config, context);
    ucp.ucp_config_release(config);
    return status;
}

EXPORT int dx_open(
    const char *library, const char *settings, const char *door_settings, const uint8_t *uid, uint32_t num_imms, double stall_s, shim_t **out,
    char *text)
{
    int code = resolve(library, text);
    if (code != DX_OK)
        return code;
    shim_t *shim = calloc(1, sizeof *shim);
    if (shim == NULL || (shim->counters = calloc(num_imms, sizeof *shim->counters)) == NULL) {
        free(shim);
        return say(text, DX_MEMORY, "shim", strerror(ENOMEM));
    }
    ucs_status_t status = open_context(&shim->context, UCP_FEATURE_AM | UCP_FEATURE_WAKEUP | UCP_FEATURE_RMA, settings);
    if (status == UCS_OK && (status = open_context(&shim->doorway, UCP_FEATURE_AM | UCP_FEATURE_WAKEUP, door_settings)) != UCS_OK)
        ucp.ucp_cleanup(shim->context);
    if (status != UCS_OK) {
        free(shim->counters);
        free(shim);
        return say(text, DX_FAILED, "ucp_init", ucp.ucs_status_string(status));
    }
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&shim->changed, &monotonic);
    pthread_mutex_init(&shim->lock, NULL);
    memcpy(shim->uid, uid, UID_BYTES);
    shim->num_imms = num_imms;
    shim->stall_ns = (int64_t)(stall_s * 1e9);
    shim->wake_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    shim->num_holders = 1;
    *out = shim;
    return DX_OK;
}

EXPORT const char *dx_version(void)
{
    return ucp.ucp_get_version_string();
}

static int map(shim_t *shim, ucp_mem_map_params_t *params, uint64_t page_bytes, char *text)
{
    ucp_mem_attr_t attr = {.field_mask = UCP_MEM_ATTR_FIELD_ADDRESS};
    ucs_status_t status = ucp.ucp_mem_map(shim->context, params, &shim->memory);
    if (status != UCS_OK) {
        shim->memory = NULL;
        return say(text, DX_MEMORY, "ucp_mem_map", ucp.ucs_status_string(status));
    }
    status = ucp.ucp_mem_query(shim->memory, &attr);
    if (status == UCS_OK)
        status = ucp.ucp_rkey_pack(shim->context, shim->memory, &shim->rkey_buffer, &shim->rkey_bytes);
    if (status != UCS_OK)
        return say(text, DX_FAILED, "ucp_rkey_pack", ucp.ucs_status_string(status));
    shim->pool = attr.address;
    shim->memory_type = params->memory_type;
    shim->page_bytes = page_bytes;
    shim->num_pages = params->length / page_bytes;
    return DX_OK;
}

/* Host memory from UCX, which takes shared memory if it can: a peer of this host then stores right into it. */
EXPORT int dx_allocate(shim_t *shim, uint64_t num_bytes, uint64_t page_bytes, void **address, char *text)
{
    ucp_mem_map_params_t params = {
        .field_mask = UCP_MEM_MAP_PARAM_FIELD_LENGTH | UCP_MEM_MAP_PARAM_FIELD_FLAGS | UCP_MEM_MAP_PARAM_FIELD_MEMORY_TYPE,
        .length = num_bytes,
        .flags = UCP_MEM_MAP_ALLOCATE,
        .memory_type = UCS_MEMORY_TYPE_HOST,
    };
    int code = map(shim, &params, page_bytes, text);
    if (code == DX_OK) {
        *address = shim->pool;
        shim->num_holders++;
    }
    return code;
}

static bool moves(const shim_t *shim, int memory_type)
{
    ucp_context_attr_t attr = {.field_mask = UCP_ATTR_FIELD_MEMORY_TYPES};
    return ucp.ucp_context_query(shim->context, &attr) == UCS_OK && (attr.memory_types >> memory_type & 1) != 0;
}

/* Memory of the caller's; it must stay until the last dx_release. `driver`: CUDA's, if a stream computes its pages; or NULL. */
EXPORT int dx_register(
    shim_t *shim, void *address, uint64_t num_bytes, uint64_t page_bytes, int memory_type, const char *driver, char *text)
{
    int code = driver == NULL ? DX_OK : gpu_open(&shim->gpu, driver, text);
    if (code != DX_OK)
        return code;
    if (!moves(shim, memory_type))
        return say(text, DX_FAILED, "this UCX does not move GPU memory", "it lacks CUDA, or cannot load it");
    ucp_mem_map_params_t params = {
        .field_mask = UCP_MEM_MAP_PARAM_FIELD_ADDRESS | UCP_MEM_MAP_PARAM_FIELD_LENGTH | UCP_MEM_MAP_PARAM_FIELD_MEMORY_TYPE,
        .address = address,
        .length = num_bytes,
        .memory_type = memory_type,
    };
    return map(shim, &params, page_bytes, text);
}

EXPORT void dx_release(shim_t *shim)
{
    if (--shim->num_holders > 0)
        return;
    if (shim->rkey_buffer != NULL)
        ucp.ucp_rkey_buffer_release(shim->rkey_buffer);
    if (shim->memory != NULL)
        ucp.ucp_mem_unmap(shim->context, shim->memory);
    ucp.ucp_cleanup(shim->doorway);
    ucp.ucp_cleanup(shim->context);
    close(shim->wake_fd);
    pthread_cond_destroy(&shim->changed);
    pthread_mutex_destroy(&shim->lock);
    free(shim->counters);
    free(shim);
}
