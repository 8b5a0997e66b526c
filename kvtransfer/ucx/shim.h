/* One process's end of the `ucx` transport: a pool that others write into, and links to the pools of others.

   Python's threads post jobs and read counters; one thread of ours talks to UCX and is the only one that does once it runs.

     link (writer)  DOWN ──► DIALING ──HELLO──► door (receiver): older guests of that writer are torn down, a new one is opened
                      ▲         └──◄──WELCOME── guest
                      │       OPEN: pages computed?  puts ══► pool;  flush;  COUNT {imm, pages} ──► guest: counter += pages;  ◄── ACK
                      │       where only TCP reaches, or the target's memory is not UCX's (its emulation of puts aborts a target
                      │       whose writer has gone):   PAGES ──► guest: copied, counter += pages;   ◄── ACK
                      └── fault or stall: the endpoint is closed by force, its worker destroyed, its jobs are lost; dialled again

   A line, a worker of its own with one endpoint, is what either side of a link lives in, so that tearing it down ends whatever may still
   arrive on it: sockets, queue pairs and FIFOs go with the worker, and copies of the writer's own GPU are waited for. Therefore a WELCOME proves that nothing of the writer's earlier lives
   can land any more, and an ACK that a job's pages and its count have landed. Until it has one of the two, `dx_stop` says no. */

#ifndef DIPTYCH_SHIM_H
#define DIPTYCH_SHIM_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "ucp_abi.h"

enum { DX_OK = 0, DX_GONE = 1, DX_RANGE = 2, DX_MEMORY = 3, DX_FAILED = 4 };    /* what Python makes its exceptions from */
enum { UID_BYTES = 16, TEXT_BYTES = 256, MAX_MESSAGE_BYTES = 1 << 16 };
enum { AM_HELLO = 1, AM_WELCOME = 2, AM_PAGES = 3, AM_COUNT = 4, AM_ACK = 5, AM_BYE = 6 };
#define MS INT64_C(1000000)
#define EXPORT __attribute__((visibility("default")))

#define X(name, result, arguments) result(*name) arguments;
struct ucp_functions {
    UCP_FUNCTIONS(X)
};
#undef X
extern struct ucp_functions ucp;

typedef struct {
    uint8_t uid[UID_BYTES];          /* the writer's */
    uint8_t target_uid[UID_BYTES];   /* an address may have been taken over by another process */
    uint64_t life;                   /* of the link; larger is later */
} hello_t;

typedef struct {
    uint64_t job;
    uint64_t offset;                 /* of PAGES, in the receiver's pool */
    uint32_t imm;
    uint32_t num_pages;
} count_t;                           /* of PAGES and COUNT, and sent back as their ACK */

typedef struct {
    ucp_worker_h worker;             /* NULL: the line is down */
    int efd;
    ucp_ep_h ep;
    int fault;                       /* the first error, a ucs_status_t; 0: none */
} line_t;

typedef struct run {                 /* neighbours here and there: one put, or one message */
    uint64_t source, target, num_bytes;
    count_t count;                   /* a message's header, which must stay as long as it is under way */
} run_t;

typedef struct {                     /* all zero: the pool is host memory */
    void *context;                   /* CUDA's, of the pool */
    bool flushes;                    /* what a NIC writes must be flushed before kernels see it */
} gpu_t;

typedef enum { MARK_AHEAD, MARK_PASSED, MARK_LOST } mark_state_t;    /* LOST: the GPU reports an error */

typedef enum { JOB_POSTING, JOB_FLUSHING, JOB_COUNTING } job_state_t;

typedef struct job {
    struct job *next;
    struct link *link;
    job_state_t state;
    count_t count;
    uint32_t num_runs, next_run;
    uint32_t num_puts_out;
    uint32_t num_owed;               /* pages that an ACK is owed for */
    bool cut;                        /* stopped before all of it was posted */
    bool flushed;
    void *mark;                      /* in the stream that computes the pages; NULL: they are there */
    int64_t started_ns, moved_ns;
    run_t runs[];
} job_t;

typedef struct {
    uint64_t stopped_through;        /* jobs up to this one are not to go on */
    uint64_t lost_in;                /* the last life that took jobs with it; 0: none */
    uint64_t lost_job;               /* the last of them */
    uint32_t num_live;               /* jobs accepted and not ended */
    int64_t busy_ns;
} imm_state_t;

typedef enum { LINK_DOWN, LINK_DIALING, LINK_OPEN, LINK_CLOSED } link_state_t;

typedef struct link {
    struct link *next;
    struct shim *shim;
    uint8_t target_uid[UID_BYTES];
    uint64_t target_base, target_pages;
    int target_memory_type;
    bool target_lent;                /* memory that UCX has not allocated: inside a host it would emulate the puts */
    void *rkey_buffer, *door_address;

    /* the thread's own */
    line_t call;                     /* to the door, over TCP: shows at once when the receiver dies */
    line_t line;                     /* to the guest */
    bool by_message;                 /* PAGES instead of puts */
    bool awaits_gpu, gpu_lost;
    ucp_rkey_h rkey;
    void *welcome;                   /* the guest's address, once it has come */
    job_t *active, **active_end;
    uint32_t num_active, num_puts_out;
    int64_t retry_ns, deadline_ns, backoff_ns;

    /* guarded by the shim's lock */
    link_state_t state;
    uint64_t life, fenced_through;
    bool leaving;
    int64_t leave_by_ns;             /* by force then */
    char why[TEXT_BYTES], lanes[TEXT_BYTES];
    job_t *queued, **queued_end;
    uint64_t num_jobs;
    imm_state_t imms[];
} link_t;

typedef struct guest {               /* the receiver's end of a writer's link */
    struct guest *next;
    struct shim *shim;
    line_t line;
    hello_t hello;
    bool leaving;
} guest_t;

typedef struct caller {              /* a HELLO that waits to be answered */
    struct caller *next;
    hello_t hello;
    uint8_t address[];
} caller_t;

typedef struct barred {              /* a writer that was fenced: a life that is over, and its name with it */
    struct barred *next;
    uint8_t uid[UID_BYTES];
} barred_t;

typedef struct fence {
    struct fence *next;
    uint8_t uid[UID_BYTES];
    bool everybody;                  /* whatever the uid: the writer is not known */
    bool done;
} fence_t;

typedef struct shim {
    atomic_int num_holders;          /* the transport, and the pool's tensor: UCX's memory outlives the thread */
    ucp_context_h context;
    ucp_context_h doorway;           /* TCP alone: on shared memory UCX keeps what belongs to a caller mapped for ever */
    ucp_mem_h memory;
    int memory_type;
    gpu_t gpu;
    void *pool, *rkey_buffer;
    size_t rkey_bytes;
    uint64_t page_bytes, num_pages;
    uint8_t uid[UID_BYTES];
    uint32_t num_imms;
    _Atomic uint64_t *counters;
    int64_t stall_ns;
    ucp_address_t *door_address;
    size_t door_address_bytes;
    pthread_t thread;
    bool running;
    int wake_fd;

    /* the thread's own */
    line_t door;
    guest_t *guests;
    caller_t *callers;
    barred_t *barred;

    /* guarded by lock; changed: a job, a link or a fence has moved on */
    pthread_mutex_t lock;
    pthread_cond_t changed;
    link_t *links;
    fence_t *fences;
    bool closing;
    uint64_t pages_sent;
    int64_t busy_ns;
} shim_t;

/* loop.c */
int64_t now_ns(void);
int say(char *text, int code, const char *what, const char *why);
void wake(shim_t *shim);
bool wait_changed(shim_t *shim, int64_t deadline_ns);

/* line.c */
ucs_status_t line_open(ucp_context_h context, line_t *line);
ucs_status_t line_dial(line_t *line, const void *address);
ucs_status_t line_listen(line_t *line, unsigned id, ucp_am_recv_callback_t callback, void *arg);
void line_send(line_t *line, unsigned id, const void *header, size_t header_bytes, const void *body, size_t body_bytes);
ucs_status_t line_address(line_t *line, ucp_address_t **address, size_t *num_bytes);
void line_settle(line_t *line, ucs_status_ptr_t request, int64_t limit_ns);
void line_hang_up(line_t *line, ucp_rkey_h rkey);

/* gpu.c */
int gpu_open(gpu_t *gpu, const char *driver, char *text);
void gpu_enter(const gpu_t *gpu);
int gpu_mark(void *stream, void **mark, char *text);
void gpu_settle(const gpu_t *gpu);
mark_state_t gpu_look(void *mark);
void gpu_forget(void *mark);
bool gpu_shows_writes(const gpu_t *gpu);

/* receiver.c */
ucs_status_t door_open(shim_t *shim);
unsigned receiver_turn(shim_t *shim);
void receiver_close(shim_t *shim);

/* jobs.c */
void jobs_append(job_t ***end, job_t *job);
void job_free(job_t *job);
void job_end(job_t *job, bool lost);
void take_queued(link_t *link);
bool advance_jobs(link_t *link);

/* link.c */
unsigned link_turn(link_t *link);
void link_break(link_t *link, const char *why);
void link_leave(link_t *link);
void link_free(link_t *link);

#endif
