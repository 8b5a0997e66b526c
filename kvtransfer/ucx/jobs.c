/* Jobs of a link: pages posted as puts or messages, flushed, counted, acknowledged. */

#include <stdlib.h>

#include "shim.h"

enum { MAX_ACTIVE_JOBS = 64, MAX_PUTS_OUT = 128, PUTS_PER_TURN = 16 };

void jobs_append(job_t ***end, job_t *job)
{
    job->next = NULL;
    **end = job;
    *end = &job->next;
}

void job_free(job_t *job)
{
    gpu_forget(job->mark);
    free(job);
}

/* Under the lock. */
void job_end(job_t *job, bool lost)
{
    link_t *link = job->link;
    imm_state_t *imm = &link->imms[job->count.imm];
    imm->num_live--;
    if (lost) {
        imm->lost_in = link->life;
        imm->lost_job = job->count.job;
    }
    job_free(job);
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

/* Its pages are computed, or are not to go anyway. */
static bool is_due(job_t *job)
{
    mark_state_t state = job->mark == NULL ? MARK_PASSED : gpu_look(job->mark);
    job->link->gpu_lost |= state == MARK_LOST;
    return state == MARK_PASSED || (state == MARK_AHEAD && is_stopped(job));
}

static void move_on(job_t *job, ucs_status_t status)
{
    job->moved_ns = now_ns();
    if (status != UCS_OK && job->link->line.fault == 0)
        job->link->line.fault = status;
}

static void run_ended(void *request, ucs_status_t status, void *user_data)
{
    job_t *job = user_data;
    job->num_puts_out--;
    job->link->num_puts_out--;
    move_on(job, status);
    if (request != NULL)
        ucp.ucp_request_free(request);
}

static void flush_ended(void *request, ucs_status_t status, void *user_data)
{
    job_t *job = user_data;
    job->flushed = true;
    move_on(job, status);
    if (request != NULL)
        ucp.ucp_request_free(request);
}

static ucs_status_ptr_t put(job_t *job, const run_t *run, ucp_request_param_t *params)
{
    link_t *link = job->link;
    const char *source = (const char *)link->shim->pool + run->source;
    params->op_attr_mask |= UCP_OP_ATTR_FIELD_MEMORY_TYPE | UCP_OP_ATTR_FIELD_MEMH;
    params->memory_type = link->shim->memory_type;
    params->memh = link->shim->memory;
    return ucp.ucp_put_nbx(link->line.ep, source, run->num_bytes, link->target_base + run->target, link->rkey, params);
}

static ucs_status_ptr_t send_pages(job_t *job, run_t *run, ucp_request_param_t *params)
{
    shim_t *shim = job->link->shim;
    run->count = (count_t){job->count.job, run->target, job->count.imm, (uint32_t)(run->num_bytes / shim->page_bytes)};
    job->num_owed += run->count.num_pages;
    params->op_attr_mask |= UCP_OP_ATTR_FIELD_FLAGS;
    params->flags = UCP_AM_SEND_FLAG_EAGER;
    const char *source = (const char *)shim->pool + run->source;
    return ucp.ucp_am_send_nbx(job->link->line.ep, AM_PAGES, &run->count, sizeof run->count, source, run->num_bytes, params);
}

static void post_run(job_t *job, run_t *run)
{
    ucp_request_param_t params = {
        .op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA, .cb.send = run_ended, .user_data = job};
    job->num_puts_out++, job->link->num_puts_out++;
    ucs_status_ptr_t request = job->link->by_message ? send_pages(job, run, &params) : put(job, run, &params);
    if (!UCS_PTR_IS_PTR(request))
        run_ended(NULL, UCS_PTR_STATUS(request), job);
}

static void flush(job_t *job)
{
    ucp_request_param_t params = {
        .op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA, .cb.send = flush_ended, .user_data = job};
    ucs_status_ptr_t request = ucp.ucp_ep_flush_nbx(job->link->line.ep, &params);
    if (!UCS_PTR_IS_PTR(request))
        flush_ended(NULL, UCS_PTR_STATUS(request), job);
}

/* Posts what the window allows; false if that is nothing. */
static bool post(job_t *job, int *num_puts)
{
    link_t *link = job->link;
    int before = *num_puts;
    if (job->started_ns == 0)
        job->started_ns = job->moved_ns = now_ns();
    job->cut = is_stopped(job);
    while (!job->cut && job->next_run < job->num_runs && *num_puts > 0 && link->num_puts_out < MAX_PUTS_OUT && link->line.fault == 0) {
        post_run(job, &job->runs[job->next_run++]);
        --*num_puts;
    }
    if (!job->cut && job->next_run < job->num_runs)
        return *num_puts < before;
    job->state = link->by_message ? JOB_COUNTING : JOB_FLUSHING;
    if (job->state == JOB_FLUSHING)
        flush(job);
    return true;
}

static void count_flushed(job_t *job)
{
    line_t *line = &job->link->line;
    job->state = JOB_COUNTING;
    if (job->next_run < job->num_runs)
        return;                                       /* cut */
    job->num_owed = job->count.num_pages;
    line_send(line, AM_COUNT, &job->count, sizeof job->count, NULL, 0);
}

static void account(job_t *job)
{
    shim_t *shim = job->link->shim;
    int64_t busy_ns = now_ns() - job->started_ns;
    pthread_mutex_lock(&shim->lock);
    job->link->imms[job->count.imm].busy_ns += busy_ns;
    shim->busy_ns += busy_ns;
    if (job->next_run == job->num_runs)
        shim->pages_sent += job->count.num_pages;
    job_end(job, false);
    pthread_mutex_unlock(&shim->lock);
}

/* One pass over the jobs under way, oldest first; puts are posted in order. */
bool advance_jobs(link_t *link)
{
    bool moved = false, posting = false;
    link->awaits_gpu = false;
    int num_puts = PUTS_PER_TURN;
    for (job_t **at = &link->active; *at != NULL && link->line.fault == 0;) {
        job_t *job = *at;
        if (job->state == JOB_POSTING && !posting) {
            if (job->started_ns != 0 || is_due(job))
                moved |= post(job, &num_puts);
            else
                link->awaits_gpu = true;
            posting = job->state == JOB_POSTING;
        }
        if (job->state == JOB_FLUSHING && job->flushed && job->num_puts_out == 0) {
            count_flushed(job);
            moved = true;
        }
        if (job->state != JOB_COUNTING || job->num_owed > 0 || job->num_puts_out > 0 || link->line.fault != 0) {
            at = &job->next;
            continue;
        }
        *at = job->next;
        if (*at == NULL)
            link->active_end = at;
        link->num_active--;
        account(job);
        moved = true;
    }
    return moved;
}

void take_queued(link_t *link)
{
    pthread_mutex_lock(&link->shim->lock);
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
