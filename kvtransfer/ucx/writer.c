/* The writer's side: a link to a peer's pool and the jobs on it (shim.h draws both). */

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "shim.h"

enum { MAX_ACTIVE_JOBS = 64, MAX_PUTS_OUT = 128, PUTS_PER_TURN = 16 };
#define DIAL_LIMIT_NS (2000 * MS)
#define MIN_BACKOFF_NS (50 * MS)
#define MAX_BACKOFF_NS (2000 * MS)
#define BYE_LIMIT_NS (100 * MS)

/* jobs */

void jobs_append(job_t ***end, job_t *job)
{
    job->next = NULL;
    **end = job;
    *end = &job->next;
}

/* Under the lock. */
void job_end(job_t *job, bool lost)
{
    link_t *link = job->link;
    imm_state_t *imm = &link->imms[job->count.imm];
    imm->num_live--;
    if (lost)
        imm->lost_in = link->life;
    free(job);
    pthread_cond_broadcast(&link->shim->changed);
}

static bool is_stopped(job_t *job)
{
    shim_t *shim = job->link->shim;
    pthread_mutex_lock(&shim->lock);
    bool stopped = job->count.job <= job->link->imms[job->count.imm].stopped_through;
    pthread_mutex_unlock(&shim->lock);
    return stopped;
}

static void job_fault(job_t *job, ucs_status_t status)
{
    if (job->link->line.fault == 0)
        job->link->line.fault = status;
}

static void put_ended(void *request, ucs_status_t status, void *user_data)
{
    job_t *job = user_data;
    job->num_puts_out--;
    job->link->num_puts_out--;
    job->link->moved_ns = now_ns();
    if (status != UCS_OK)
        job_fault(job, status);
    ucp.ucp_request_free(request);
}

static void flush_ended(void *request, ucs_status_t status, void *user_data)
{
    job_t *job = user_data;
    job->state = JOB_FLUSHED;
    job->link->moved_ns = now_ns();
    if (status != UCS_OK)
        job_fault(job, status);
    if (request != NULL)
        ucp.ucp_request_free(request);
}

static void post_put(job_t *job, const run_t *run)
{
    link_t *link = job->link;
    shim_t *shim = link->shim;
    ucp_request_param_t params = {
        .op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_MEMORY_TYPE | UCP_OP_ATTR_FIELD_MEMH,
        .cb.send = put_ended,
        .user_data = job,
        .memory_type = shim->memory_type,
        .memh = shim->memory,
    };
    const char *source = (const char *)shim->pool + run->source;
    job->num_puts_out++, link->num_puts_out++;
    ucs_status_ptr_t request = ucp.ucp_put_nbx(link->line.ep, source, run->num_bytes, link->target_base + run->target, link->rkey, &params);
    if (UCS_PTR_IS_PTR(request))
        return;
    job->num_puts_out--, link->num_puts_out--;
    link->moved_ns = now_ns();
    if (UCS_PTR_IS_ERR(request))
        job_fault(job, UCS_PTR_STATUS(request));
}

static void flush(job_t *job)
{
    ucp_request_param_t params = {
        .op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA, .cb.send = flush_ended, .user_data = job};
    job->state = JOB_FLUSHING;
    ucs_status_ptr_t request = ucp.ucp_ep_flush_nbx(job->link->line.ep, &params);
    if (!UCS_PTR_IS_PTR(request))
        flush_ended(NULL, UCS_PTR_STATUS(request), job);
}

/* Posts what the window allows; true if anything was. */
static bool post(job_t *job, int *num_puts)
{
    bool moved = false;
    if (job->started_ns == 0)
        job->started_ns = now_ns();
    job->cut = job->next_run < job->num_runs && is_stopped(job);
    while (!job->cut && job->next_run < job->num_runs && *num_puts > 0 && job->link->num_puts_out < MAX_PUTS_OUT && job->link->line.fault == 0) {
        post_put(job, &job->runs[job->next_run++]);
        --*num_puts;
        moved = true;
    }
    if (job->cut || job->next_run == job->num_runs) {
        flush(job);
        moved = true;
    }
    return moved;
}

static void count_flushed(job_t *job)
{
    link_t *link = job->link;
    shim_t *shim = link->shim;
    int64_t busy_ns = now_ns() - job->started_ns;
    pthread_mutex_lock(&shim->lock);
    link->imms[job->count.imm].busy_ns += busy_ns;
    shim->busy_ns += busy_ns;
    if (!job->cut)
        shim->pages_sent += job->count.num_pages;
    pthread_mutex_unlock(&shim->lock);
    job->state = job->cut ? JOB_COUNTED : JOB_COUNTING;
    if (!job->cut)
        line_send(&link->line, link->line.ep, AM_COUNT, &job->count, sizeof job->count, NULL, 0);
}

/* One pass over the jobs under way, oldest first; puts are posted in order. */
static bool advance_jobs(link_t *link)
{
    bool moved = false, posting = false;
    int num_puts = PUTS_PER_TURN;
    for (job_t **at = &link->active; *at != NULL && link->line.fault == 0;) {
        job_t *job = *at;
        if (job->state == JOB_POSTING && !posting) {
            moved |= post(job, &num_puts);
            posting = job->state == JOB_POSTING;
        }
        if (job->state == JOB_FLUSHED && job->num_puts_out == 0) {
            count_flushed(job);
            moved = true;
        }
        if (job->state != JOB_COUNTED) {
            at = &job->next;
            continue;
        }
        *at = job->next;
        if (*at == NULL)
            link->active_end = at;
        link->num_active--;
        pthread_mutex_lock(&link->shim->lock);
        job_end(job, false);
        pthread_mutex_unlock(&link->shim->lock);
        moved = true;
    }
    return moved;
}

static void take_queued(link_t *link)
{
    pthread_mutex_lock(&link->shim->lock);
    if (link->num_active == 0 && link->queued != NULL)
        link->moved_ns = now_ns();
    while (link->queued != NULL && link->num_active < MAX_ACTIVE_JOBS) {
        job_t *job = link->queued;
        link->queued = job->next;
        if (link->queued == NULL)
            link->queued_end = &link->queued;
        jobs_append(&link->active_end, job);
        link->num_active++;
    }
    pthread_mutex_unlock(&link->shim->lock);
}

/* the link */

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
    uint64_t number;
    if (header_bytes != sizeof number)
        return UCS_OK;
    memcpy(&number, header, sizeof number);
    for (job_t *job = link->active; job != NULL; job = job->next)
        if (job->count.job == number && job->state == JOB_COUNTING)
            job->state = JOB_COUNTED;
    link->moved_ns = now_ns();
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
    ucs_status_t status = line_open(shim, &link->line);
    if (status == UCS_OK)
        status = line_listen(&link->line, AM_WELCOME, hear_welcome, link);
    if (status == UCS_OK)
        status = line_listen(&link->line, AM_ACK, hear_ack, link);
    if (status == UCS_OK)
        status = line_dial(&link->line, link->door_address, &link->line.door_ep);
    if (status == UCS_OK)
        status = line_address(&link->line, &address, &address_bytes);
    if (status == UCS_OK) {
        line_send(&link->line, link->line.door_ep, AM_HELLO, &hello, sizeof hello, address, address_bytes);
        ucp.ucp_worker_release_address(link->line.worker, address);
    } else
        link_break(link, ucp.ucs_status_string(status));
}

static void describe_lanes(link_t *link, char *text)
{
    ucp_transport_entry_t entries[16];
    ucp_ep_attr_t attr = {.field_mask = UCP_EP_ATTR_FIELD_TRANSPORTS, .transports = {entries, 16, sizeof entries[0]}};
    size_t used = 0;
    text[0] = '\0';
    if (ucp.ucp_ep_query(link->line.ep, &attr) != UCS_OK)
        return;
    for (unsigned i = 0; i < attr.transports.num_entries && used < TEXT_BYTES; i++)
        used += (size_t)snprintf(
            text + used, TEXT_BYTES - used, "%s%s/%s", i ? " " : "", entries[i].transport_name, entries[i].device_name);
}

static void open_link(link_t *link)
{
    shim_t *shim = link->shim;
    char lanes[TEXT_BYTES];
    ucs_status_t status = line_dial(&link->line, link->welcome, &link->line.ep);
    if (status == UCS_OK)
        status = ucp.ucp_ep_rkey_unpack(link->line.ep, link->rkey_buffer, &link->rkey);
    if (status != UCS_OK) {
        link_break(link, ucp.ucs_status_string(status));
        return;
    }
    describe_lanes(link, lanes);
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
    line_hang_up(&link->line, link->rkey);
    link->rkey = NULL;
    free(link->welcome);
    link->welcome = NULL;
    link->backoff_ns = link->backoff_ns == 0 ? MIN_BACKOFF_NS : link->backoff_ns * 2 < MAX_BACKOFF_NS ? link->backoff_ns * 2 : MAX_BACKOFF_NS;
    link->retry_ns = now_ns() + link->backoff_ns;
    link->num_active = link->num_puts_out = 0;
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
    line_send(&link->line, link->line.ep, AM_BYE, link->target_uid, UID_BYTES, NULL, 0);
    line_settle(&link->line, ucp.ucp_ep_flush_nbx(link->line.ep, &params), BYE_LIMIT_NS);
}

static void leave(link_t *link)
{
    if (link->state == LINK_OPEN && link->line.fault == 0)
        say_bye(link);
    link_break(link, "disconnected");
    pthread_mutex_lock(&link->shim->lock);
    link->state = LINK_CLOSED;
    pthread_mutex_unlock(&link->shim->lock);
}

unsigned link_turn(link_t *link)
{
    char why[TEXT_BYTES];
    int64_t now = now_ns();
    unsigned worked = link->line.worker != NULL ? ucp.ucp_worker_progress(link->line.worker) : 0;
    if (link->line.worker != NULL && link->line.fault != 0) {
        link_break(link, ucp.ucs_status_string((ucs_status_t)link->line.fault));
        return 1;
    }
    pthread_mutex_lock(&link->shim->lock);
    bool leaving = link->leaving && link->queued == NULL;
    pthread_mutex_unlock(&link->shim->lock);
    if (leaving && link->num_active == 0) {
        leave(link);
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
        if (link->num_active > 0 && now_ns() - link->moved_ns > link->shim->stall_ns) {
            snprintf(why, sizeof why, "nothing moved for %.1f s with %u writes under way", (double)link->shim->stall_ns / 1e9, link->num_active);
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
