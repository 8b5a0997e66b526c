/* The writer's side: a link to a peer's pool, dialled, kept and dialled again (shim.h draws it). */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "shim.h"

#define DIAL_LIMIT_NS (2000 * MS)
#define MIN_BACKOFF_NS (50 * MS)
#define MAX_BACKOFF_NS (2000 * MS)
#define BYE_LIMIT_NS (100 * MS)

static ucs_status_t hear_welcome(
    void *arg, const void *header, size_t header_bytes, void *address, size_t address_bytes, const ucp_am_recv_param_t *param)
{
    link_t *link = arg;
    hello_t hello;
    bool whole = header_bytes == sizeof hello && address_bytes > 0 && !(param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV);
    if (!whole || link->welcome != NULL)
        return UCS_OK;
    memcpy(&hello, header, sizeof hello);
    if (hello.life == link->life && memcmp(hello.uid, link->shim->uid, UID_BYTES) == 0 && (link->welcome = malloc(address_bytes)) != NULL)
        memcpy(link->welcome, address, address_bytes);
    return UCS_OK;
}

static ucs_status_t hear_ack(void *arg, const void *header, size_t header_bytes, void *body, size_t body_bytes, const ucp_am_recv_param_t *param)
{
    (void)body, (void)body_bytes, (void)param;
    link_t *link = arg;
    count_t count;
    if (header_bytes != sizeof count)
        return UCS_OK;
    memcpy(&count, header, sizeof count);
    for (job_t *job = link->active; job != NULL; job = job->next)
        if (job->count.job == count.job && count.num_pages <= job->num_owed) {
            job->num_owed -= count.num_pages;
            job->moved_ns = now_ns();
        }
    return UCS_OK;
}

static void dial(link_t *link)
{
    shim_t *shim = link->shim;
    pthread_mutex_lock(&shim->lock);
    link->state = LINK_DIALING;
    hello_t hello = {.life = ++link->life};
    pthread_mutex_unlock(&shim->lock);
    memcpy(hello.uid, shim->uid, UID_BYTES);
    memcpy(hello.target_uid, link->target_uid, UID_BYTES);
    link->deadline_ns = now_ns() + DIAL_LIMIT_NS;
    ucp_address_t *address = NULL;
    size_t address_bytes = 0;
    ucs_status_t status = line_open(shim->doorway, &link->call);
    if (status == UCS_OK)
        status = line_open(shim->context, &link->line);
    if (status == UCS_OK)
        status = line_listen(&link->line, AM_WELCOME, hear_welcome, link);
    if (status == UCS_OK)
        status = line_listen(&link->line, AM_ACK, hear_ack, link);
    if (status == UCS_OK)
        status = line_dial(&link->call, link->door_address);
    if (status == UCS_OK)
        status = line_address(&link->line, &address, &address_bytes);
    if (status == UCS_OK) {
        line_send(&link->call, AM_HELLO, &hello, sizeof hello, address, address_bytes);
        ucp.ucp_worker_release_address(link->line.worker, address);
    } else
        link_break(link, ucp.ucs_status_string(status));
}

static bool is_of_gpu(const link_t *link)
{
    return link->shim->memory_type != UCS_MEMORY_TYPE_HOST || link->target_memory_type != UCS_MEMORY_TYPE_HOST;
}

/* Over which UCX emulates puts, by messages that the target must make progress on. */
static bool emulates_puts(const link_t *link, const char *transport)
{
    static const char *const in_host[] = {"self", "sysv", "posix", "cma", "knem", "xpmem", "cuda_copy", "gdr_copy"};
    bool emulates = strcmp(transport, "tcp") == 0 || strncmp(transport, "ud_", 3) == 0;
    for (size_t i = 0; (link->target_lent || is_of_gpu(link)) && i < sizeof in_host / sizeof in_host[0]; i++)
        emulates |= strcmp(transport, in_host[i]) == 0;
    return emulates;
}

/* True if there is one that takes puts. */
static bool describe_lanes(link_t *link, char *text)
{
    ucp_transport_entry_t entries[16];
    ucp_ep_attr_t attr = {.field_mask = UCP_EP_ATTR_FIELD_TRANSPORTS, .transports = {entries, 16, sizeof entries[0]}};
    size_t used = 0;
    bool fast = false;
    text[0] = '\0';
    if (ucp.ucp_ep_query(link->line.ep, &attr) != UCS_OK)
        return false;
    for (unsigned i = 0; i < attr.transports.num_entries && used < TEXT_BYTES; i++) {
        const char *name = entries[i].transport_name;
        used += (size_t)snprintf(text + used, TEXT_BYTES - used, "%s%s/%s", i ? " " : "", name, entries[i].device_name);
        fast |= !emulates_puts(link, name);
    }
    return fast;
}

static void open_link(link_t *link)
{
    shim_t *shim = link->shim;
    char lanes[TEXT_BYTES];
    ucs_status_t status = line_dial(&link->line, link->welcome);
    if (status == UCS_OK)
        status = ucp.ucp_ep_rkey_unpack(link->line.ep, link->rkey_buffer, &link->rkey);
    if (status != UCS_OK) {
        link_break(link, ucp.ucs_status_string(status));
        return;
    }
    link->by_message = !describe_lanes(link, lanes);
    if (link->by_message && is_of_gpu(link)) {
        char why[TEXT_BYTES];
        say(why, DX_GONE, "no lane puts into or out of GPU memory", lanes);
        pthread_mutex_lock(&shim->lock);
        link->fenced_through = link->life - 1;        /* the WELCOME proves that, lanes or none */
        pthread_mutex_unlock(&shim->lock);
        link_break(link, why);
        return;
    }
    link->backoff_ns = 0;
    pthread_mutex_lock(&shim->lock);
    link->state = LINK_OPEN;
    link->fenced_through = link->life - 1;
    memcpy(link->lanes, lanes, sizeof lanes);
    pthread_cond_broadcast(&shim->changed);
    pthread_mutex_unlock(&shim->lock);
}

static void lose_jobs(job_t **jobs, job_t ***end)
{
    while (*jobs != NULL) {
        job_t *job = *jobs;
        *jobs = job->next;
        job_end(job, true);
    }
    *end = jobs;
}

/* Tears the line down; its jobs are lost, and it is dialled again after a while. */
void link_break(link_t *link, const char *why)
{
    shim_t *shim = link->shim;
    if (link->num_puts_out > 0)
        gpu_settle(&shim->gpu);
    line_hang_up(&link->line, link->rkey);
    line_hang_up(&link->call, NULL);
    link->rkey = NULL;
    free(link->welcome);
    link->welcome = NULL;
    link->backoff_ns = link->backoff_ns == 0 ? MIN_BACKOFF_NS : link->backoff_ns * 2 < MAX_BACKOFF_NS ? link->backoff_ns * 2 : MAX_BACKOFF_NS;
    link->retry_ns = now_ns() + link->backoff_ns;
    link->num_active = link->num_puts_out = 0;
    link->awaits_gpu = link->gpu_lost = false;
    pthread_mutex_lock(&shim->lock);
    lose_jobs(&link->active, &link->active_end);
    lose_jobs(&link->queued, &link->queued_end);
    link->state = LINK_DOWN;
    snprintf(link->why, sizeof link->why, "%s", why);
    pthread_cond_broadcast(&shim->changed);
    pthread_mutex_unlock(&shim->lock);
}

/* A writer that leaves says so: on shared memory nothing else would tell the receiver. */
static void say_bye(link_t *link)
{
    ucp_request_param_t params = {0};
    line_send(&link->line, AM_BYE, link->target_uid, UID_BYTES, NULL, 0);
    line_settle(&link->line, ucp.ucp_ep_flush_nbx(link->line.ep, &params), BYE_LIMIT_NS);
}

void link_leave(link_t *link)
{
    if (link->state == LINK_OPEN && link->line.fault == 0 && link->call.fault == 0)
        say_bye(link);
    link_break(link, "disconnected");
    pthread_mutex_lock(&link->shim->lock);
    link->state = LINK_CLOSED;
    pthread_mutex_unlock(&link->shim->lock);
}

/* The oldest job waits for puts, a flush or an ACK for too long: stores into a dead peer's shared memory go well for ever. */
static bool has_stalled(const link_t *link)
{
    const job_t *oldest = link->active;
    return oldest != NULL && oldest->started_ns != 0 && now_ns() - oldest->moved_ns > link->shim->stall_ns;
}

static unsigned progress(link_t *link)
{
    unsigned worked = 0;
    if (link->call.worker != NULL)
        worked += ucp.ucp_worker_progress(link->call.worker);
    for (int i = 0; i < 2 && link->line.worker != NULL; i++)
        worked += ucp.ucp_worker_progress(link->line.worker);     /* twice: UCX 1.22 crashes on a put between a failure and its report */
    return worked;
}

unsigned link_turn(link_t *link)
{
    char why[TEXT_BYTES];
    int64_t now = now_ns();
    unsigned worked = progress(link);
    int fault = link->line.fault != 0 ? link->line.fault : link->call.fault;
    if (link->line.worker != NULL && fault != 0) {
        link_break(link, ucp.ucs_status_string((ucs_status_t)fault));
        return 1;
    }
    pthread_mutex_lock(&link->shim->lock);
    bool leaving = link->leaving && link->queued == NULL;
    bool by_force = leaving && now > link->leave_by_ns;
    pthread_mutex_unlock(&link->shim->lock);
    if (by_force || (leaving && link->num_active == 0)) {
        link_leave(link);
        return 1;
    }
    switch (link->state) {
    case LINK_DOWN:
        if (now < link->retry_ns)
            return worked;
        dial(link);
        return 1;
    case LINK_DIALING:
        if (link->welcome != NULL)
            open_link(link);
        else if (now > link->deadline_ns)
            link_break(link, "no answer to HELLO");
        return worked;
    case LINK_OPEN:
        take_queued(link);
        worked += advance_jobs(link);
        if (link->gpu_lost)
            link_break(link, "the GPU reports an error");
        else if (has_stalled(link)) {
            snprintf(why, sizeof why, "a write stood still for %.1f s, of %u", (double)link->shim->stall_ns / 1e9, link->num_active);
            link_break(link, why);
        }
        return worked;
    case LINK_CLOSED:
        break;
    }
    return worked;
}

void link_free(link_t *link)
{
    free(link->rkey_buffer);
    free(link->door_address);
    free(link);
}
