/* What Python calls while the thread runs. An int is a DX_ code unless a comment says otherwise; `text` (TEXT_BYTES) then has the reason. */

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "shim.h"

/* the receiver's side */

EXPORT const void *dx_rkey(shim_t *shim, size_t *num_bytes)
{
    *num_bytes = shim->rkey_bytes;
    return shim->rkey_buffer;
}

EXPORT const void *dx_address(shim_t *shim, size_t *num_bytes)
{
    *num_bytes = shim->door_address_bytes;
    return shim->door_address;
}

EXPORT uint64_t dx_num_landed(shim_t *shim, uint32_t imm)
{
    return atomic_load_explicit(&shim->counters[imm], memory_order_acquire);
}

EXPORT void dx_reset(shim_t *shim, uint32_t imm)
{
    atomic_store_explicit(&shim->counters[imm], 0, memory_order_release);
}

/* True once nothing of that writer's, which is known to be dead, can land here any more. NULL: of nobody's. */
EXPORT int dx_fence(shim_t *shim, const uint8_t *uid, double timeout_s)
{
    fence_t fence = {0};
    int64_t deadline_ns = now_ns() + (int64_t)(timeout_s * 1e9);
    fence.everybody = uid == NULL;
    if (uid != NULL)
        memcpy(fence.uid, uid, UID_BYTES);
    pthread_mutex_lock(&shim->lock);
    fence.next = shim->fences;
    shim->fences = &fence;
    wake(shim);
    while (!fence.done && wait_changed(shim, deadline_ns))
        continue;
    for (fence_t **at = &shim->fences; !fence.done && *at != NULL; at = &(*at)->next)
        if (*at == &fence) {
            *at = fence.next;
            break;
        }
    pthread_mutex_unlock(&shim->lock);
    return fence.done;
}

/* the writer's side */

static void *copy_of(const void *bytes, size_t num_bytes)
{
    void *copy = malloc(num_bytes);
    return copy == NULL ? NULL : memcpy(copy, bytes, num_bytes);
}

EXPORT link_t *dx_link(
    shim_t *shim, const uint8_t *uid, uint64_t base, uint64_t num_pages, int memory_type, int lent, const void *rkey, size_t rkey_bytes, const void *address,
    size_t address_bytes)
{
    link_t *link = calloc(1, sizeof *link + shim->num_imms * sizeof link->imms[0]);
    if (link == NULL)
        return NULL;
    link->shim = shim;
    memcpy(link->target_uid, uid, UID_BYTES);
    link->target_base = base;
    link->target_pages = num_pages;
    link->target_memory_type = memory_type;
    link->target_lent = lent != 0;
    link->rkey_buffer = copy_of(rkey, rkey_bytes);
    link->door_address = copy_of(address, address_bytes);
    link->active_end = &link->active;
    link->queued_end = &link->queued;
    if (link->rkey_buffer == NULL || link->door_address == NULL) {
        link_free(link);
        return NULL;
    }
    pthread_mutex_lock(&shim->lock);
    link->next = shim->links;
    shim->links = link;
    pthread_mutex_unlock(&shim->lock);
    wake(shim);
    return link;
}

/* Waits for an open link; `text` gets its lanes, or why it is not open. */
EXPORT int dx_await_open(link_t *link, double timeout_s, char *text)
{
    shim_t *shim = link->shim;
    int64_t deadline_ns = now_ns() + (int64_t)(timeout_s * 1e9);
    pthread_mutex_lock(&shim->lock);
    while (link->state != LINK_OPEN && wait_changed(shim, deadline_ns))
        continue;
    bool open = link->state == LINK_OPEN;
    snprintf(text, TEXT_BYTES, "%s", open ? link->lanes : link->why[0] != '\0' ? link->why : "no answer yet");
    pthread_mutex_unlock(&shim->lock);
    return open ? DX_OK : DX_GONE;
}

static bool is_kept(const shim_t *shim, const link_t *link)
{
    const link_t *other = shim->links;
    while (other != NULL && other != link)
        other = other->next;
    return other != NULL;
}

/* Ends a link once its writes have ended, or by force after the patience; the pointer is dead then. False if the thread does not get to it
   within the limit: UCX hangs. */
EXPORT int dx_unlink(link_t *link, double patience_s, double limit_s)
{
    shim_t *shim = link->shim;
    int64_t deadline_ns = now_ns() + (int64_t)(limit_s * 1e9);
    pthread_mutex_lock(&shim->lock);
    link->leaving = true;
    link->leave_by_ns = now_ns() + (int64_t)(patience_s * 1e9);
    for (job_t *job; (job = link->queued) != NULL;) {
        link->queued = job->next;
        job_end(job, false);
    }
    link->queued_end = &link->queued;
    wake(shim);
    while (!shim->closing && is_kept(shim, link) && wait_changed(shim, deadline_ns))
        continue;
    bool ended = shim->closing || !is_kept(shim, link);
    pthread_mutex_unlock(&shim->lock);
    return ended;
}

enum { MAX_PUT_BYTES = 1 << 18 };                    /* a run is cut here, so that a stop takes effect soon */

/* Neighbours on both sides become one run; returns the number of runs. */
static uint32_t merge(run_t *runs, const int64_t *source, const int64_t *target, size_t num_pages, uint64_t page_bytes)
{
    uint32_t num_runs = 0;
    for (size_t i = 0; i < num_pages; i++) {
        run_t *last = &runs[num_runs - 1];
        bool joins = i > 0 && source[i] == source[i - 1] + 1 && target[i] == target[i - 1] + 1;
        if (joins && last->num_bytes + page_bytes <= MAX_PUT_BYTES)
            last->num_bytes += page_bytes;
        else
            runs[num_runs++] = (run_t){.source = (uint64_t)source[i] * page_bytes, .target = (uint64_t)target[i] * page_bytes, .num_bytes = page_bytes};
    }
    return num_runs;
}

static int why_refused(link_t *link, uint32_t imm, char *text)
{
    if (link->state != LINK_OPEN || link->leaving)
        return say(text, DX_GONE, "the link is down", link->why);
    if (link->imms[imm].lost_job > link->imms[imm].stopped_through)
        return say(text, DX_GONE, "earlier pages were lost with the link", link->why);
    return DX_OK;
}

/* `stream`: CUDA's, which computes the pages, if the pool is a GPU's. */
EXPORT int dx_write(
    link_t *link, const int64_t *source, const int64_t *target, size_t num_pages, uint32_t imm, void *stream, char *text)
{
    shim_t *shim = link->shim;
    for (size_t i = 0; i < num_pages; i++)
        if (source[i] < 0 || (uint64_t)source[i] >= shim->num_pages || target[i] < 0 || (uint64_t)target[i] >= link->target_pages) {
            snprintf(text, TEXT_BYTES, "page %lld of %llu to page %lld of %llu", (long long)source[i], (unsigned long long)shim->num_pages,
                     (long long)target[i], (unsigned long long)link->target_pages);
            return DX_RANGE;
        }
    job_t *job = calloc(1, sizeof *job + num_pages * sizeof job->runs[0]);
    if (job == NULL)
        return say(text, DX_MEMORY, "a write", strerror(ENOMEM));
    job->link = link;
    job->num_runs = merge(job->runs, source, target, num_pages, shim->page_bytes);
    job->count = (count_t){.imm = imm, .num_pages = (uint32_t)num_pages};
    int code = shim->gpu.context == NULL ? DX_OK : gpu_mark(stream, &job->mark, text);
    pthread_mutex_lock(&shim->lock);
    code = code == DX_OK ? why_refused(link, imm, text) : code;
    if (code == DX_OK) {
        job->count.job = ++link->num_jobs;
        link->imms[imm].num_live++;
        jobs_append(&link->queued_end, job);
    }
    pthread_mutex_unlock(&shim->lock);
    if (code == DX_OK)
        wake(shim);
    else
        job_free(job);
    return code;
}

static void drop_queued(link_t *link, uint32_t imm)
{
    for (job_t **at = &link->queued; *at != NULL;) {
        job_t *job = *at;
        if (job->count.imm == imm) {
            *at = job->next;
            job_end(job, false);
        } else
            at = &job->next;
    }
    link->queued_end = &link->queued;
    while (*link->queued_end != NULL)
        link->queued_end = &(*link->queued_end)->next;
}

static bool is_drained(const link_t *link, const imm_state_t *imm)
{
    return imm->num_live == 0 && imm->lost_in <= link->fenced_through;
}

EXPORT int dx_stop(link_t *link, uint32_t imm, double timeout_s)
{
    shim_t *shim = link->shim;
    int64_t deadline_ns = now_ns() + (int64_t)(timeout_s * 1e9);
    imm_state_t *state = &link->imms[imm];
    pthread_mutex_lock(&shim->lock);
    drop_queued(link, imm);
    state->stopped_through = link->num_jobs;
    while (!is_drained(link, state) && wait_changed(shim, deadline_ns))
        continue;
    bool drained = is_drained(link, state);
    if (drained)
        state->lost_in = 0, state->busy_ns = 0;
    pthread_mutex_unlock(&shim->lock);
    return drained;
}

/* Lost jobs count as ended: what reads their pages late writes for a ticket that will never be whole. */
EXPORT int dx_settled(link_t *link, uint32_t imm)
{
    pthread_mutex_lock(&link->shim->lock);
    bool settled = link->imms[imm].num_live == 0;
    pthread_mutex_unlock(&link->shim->lock);
    return settled;
}

EXPORT double dx_busy_s(link_t *link, uint32_t imm)
{
    pthread_mutex_lock(&link->shim->lock);
    int64_t busy_ns = link->imms[imm].busy_ns;
    pthread_mutex_unlock(&link->shim->lock);
    return (double)busy_ns / 1e9;
}

EXPORT void dx_stats(shim_t *shim, uint64_t *num_pages, double *busy_s)
{
    pthread_mutex_lock(&shim->lock);
    *num_pages = shim->pages_sent;
    *busy_s = (double)shim->busy_ns / 1e9;
    pthread_mutex_unlock(&shim->lock);
}
