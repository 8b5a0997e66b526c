/* The receiver's side: the door, where writers announce themselves, and a guest for each writer's link. */

#include <stdlib.h>
#include <string.h>

#include "shim.h"

/* the door */

static ucs_status_t hear_hello(
    void *arg, const void *header, size_t header_bytes, void *address, size_t address_bytes, const ucp_am_recv_param_t *param)
{
    shim_t *shim = arg;
    hello_t hello;
    if (header_bytes != sizeof hello || address_bytes == 0 || address_bytes > MAX_MESSAGE_BYTES || (param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV))
        return UCS_OK;
    memcpy(&hello, header, sizeof hello);
    caller_t *caller = malloc(sizeof *caller + address_bytes);
    if (caller == NULL || memcmp(hello.target_uid, shim->uid, UID_BYTES) != 0) {
        free(caller);
        return UCS_OK;
    }
    caller->hello = hello;
    memcpy(caller->address, address, address_bytes);
    caller->next = shim->callers;
    shim->callers = caller;
    return UCS_OK;
}

ucs_status_t door_open(shim_t *shim)
{
    ucs_status_t status = line_open(shim->doorway, &shim->door);
    if (status == UCS_OK)
        status = line_listen(&shim->door, AM_HELLO, hear_hello, shim);
    if (status == UCS_OK)
        status = line_address(&shim->door, &shim->door_address, &shim->door_address_bytes);
    return status;
}

/* guests */

static bool read_count(count_t *count, const guest_t *guest, const void *header, size_t header_bytes)
{
    if (header_bytes != sizeof *count)
        return false;
    memcpy(count, header, sizeof *count);
    return count->imm < guest->shim->num_imms;
}

static void land(guest_t *guest, const count_t *count)
{
    if (!gpu_shows_writes(&guest->shim->gpu)) {
        guest->line.fault = UCS_ERR_IO_ERROR;         /* uncounted, and the writer notices */
        return;
    }
    atomic_fetch_add_explicit(&guest->shim->counters[count->imm], count->num_pages, memory_order_release);
    line_send(&guest->line, AM_ACK, count, sizeof *count, NULL, 0);
}

static ucs_status_t hear_count(
    void *arg, const void *header, size_t header_bytes, void *body, size_t body_bytes, const ucp_am_recv_param_t *param)
{
    (void)body, (void)body_bytes, (void)param;
    count_t count;
    if (read_count(&count, arg, header, header_bytes))
        land(arg, &count);
    return UCS_OK;
}

static ucs_status_t hear_pages(
    void *arg, const void *header, size_t header_bytes, void *body, size_t body_bytes, const ucp_am_recv_param_t *param)
{
    guest_t *guest = arg;
    shim_t *shim = guest->shim;
    uint64_t pool_bytes = shim->num_pages * shim->page_bytes;
    count_t count;
    bool here = shim->memory_type == UCS_MEMORY_TYPE_HOST && !(param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV);
    if (!here || !read_count(&count, guest, header, header_bytes))
        return UCS_OK;
    if (body_bytes != count.num_pages * shim->page_bytes || body_bytes > pool_bytes || count.offset > pool_bytes - body_bytes)
        return UCS_OK;
    memcpy((char *)shim->pool + count.offset, body, body_bytes);
    land(guest, &count);
    return UCS_OK;
}

static ucs_status_t hear_bye(void *arg, const void *header, size_t header_bytes, void *body, size_t body_bytes, const ucp_am_recv_param_t *param)
{
    (void)header, (void)header_bytes, (void)body, (void)body_bytes, (void)param;
    ((guest_t *)arg)->leaving = true;
    return UCS_OK;
}

static ucs_status_t guest_open(shim_t *shim, guest_t *guest, const caller_t *caller)
{
    ucp_address_t *address = NULL;
    size_t address_bytes = 0;
    guest->shim = shim;
    guest->hello = caller->hello;
    ucs_status_t status = line_open(shim->context, &guest->line);
    if (status == UCS_OK)
        status = line_listen(&guest->line, AM_COUNT, hear_count, guest);
    if (status == UCS_OK)
        status = line_listen(&guest->line, AM_PAGES, hear_pages, guest);
    if (status == UCS_OK)
        status = line_listen(&guest->line, AM_BYE, hear_bye, guest);
    if (status == UCS_OK)
        status = line_dial(&guest->line, caller->address);
    if (status == UCS_OK)
        status = line_address(&guest->line, &address, &address_bytes);
    if (status == UCS_OK) {
        line_send(&guest->line, AM_WELCOME, &guest->hello, sizeof guest->hello, address, address_bytes);
        ucp.ucp_worker_release_address(guest->line.worker, address);
    }
    return status;
}

/* Ends the guests of that writer (NULL: of all) that are older than `life`; true if one of that life or a later is left. */
static bool see_off(shim_t *shim, const uint8_t *uid, uint64_t life)
{
    bool newer = false;
    for (guest_t **at = &shim->guests; *at != NULL;) {
        guest_t *guest = *at;
        bool same = uid == NULL || memcmp(guest->hello.uid, uid, UID_BYTES) == 0;
        if (same && guest->hello.life < life) {
            *at = guest->next;
            line_hang_up(&guest->line, NULL);
            free(guest);
        } else {
            newer |= same;
            at = &guest->next;
        }
    }
    return newer;
}

static bool is_barred(const shim_t *shim, const uint8_t *uid)
{
    const barred_t *barred = shim->barred;
    while (barred != NULL && memcmp(barred->uid, uid, UID_BYTES) != 0)
        barred = barred->next;
    return barred != NULL;
}

static bool bar(shim_t *shim, const uint8_t *uid)
{
    if (is_barred(shim, uid))
        return true;
    barred_t *barred = malloc(sizeof *barred);
    if (barred == NULL)
        return false;
    memcpy(barred->uid, uid, UID_BYTES);
    barred->next = shim->barred;
    shim->barred = barred;
    return true;
}

static void admit(shim_t *shim, const caller_t *caller)
{
    guest_t *guest;
    if (is_barred(shim, caller->hello.uid))
        return;
    if (see_off(shim, caller->hello.uid, caller->hello.life) || (guest = calloc(1, sizeof *guest)) == NULL)
        return;
    if (guest_open(shim, guest, caller) == UCS_OK) {
        guest->next = shim->guests;
        shim->guests = guest;
    } else {
        line_hang_up(&guest->line, NULL);
        free(guest);
    }
}

/* A fence asks that nothing of a writer that has died can land any more. It stands for good: who was given up behind a cut cable may live on,
 * and would dial again once the cable is joined. */
static void raise_fences(shim_t *shim)
{
    pthread_mutex_lock(&shim->lock);
    while (shim->fences != NULL) {
        fence_t raised = *shim->fences;               /* who asked for it may run out of patience meanwhile */
        pthread_mutex_unlock(&shim->lock);
        bool stands = raised.everybody || bar(shim, raised.uid);
        see_off(shim, raised.everybody ? NULL : raised.uid, UINT64_MAX);
        pthread_mutex_lock(&shim->lock);
        if (!stands)
            break;                                    /* without memory for the name: the next turn tries again */
        for (fence_t **at = &shim->fences; *at != NULL;) {
            fence_t *fence = *at;
            if (fence->everybody == raised.everybody && memcmp(fence->uid, raised.uid, UID_BYTES) == 0) {
                fence->done = true;
                *at = fence->next;
            } else
                at = &fence->next;
        }
        pthread_cond_broadcast(&shim->changed);
    }
    pthread_mutex_unlock(&shim->lock);
}

unsigned receiver_turn(shim_t *shim)
{
    unsigned worked = ucp.ucp_worker_progress(shim->door.worker);
    while (shim->callers != NULL) {
        caller_t *caller = shim->callers;
        shim->callers = caller->next;
        admit(shim, caller);
        free(caller);
    }
    for (guest_t **at = &shim->guests; *at != NULL;) {
        guest_t *guest = *at;
        worked += ucp.ucp_worker_progress(guest->line.worker);
        if (guest->line.fault == 0 && !guest->leaving) {
            at = &guest->next;
            continue;
        }
        *at = guest->next;
        line_hang_up(&guest->line, NULL);
        free(guest);
    }
    raise_fences(shim);
    return worked;
}

void receiver_close(shim_t *shim)
{
    raise_fences(shim);
    while (shim->guests != NULL) {
        guest_t *guest = shim->guests;
        shim->guests = guest->next;
        line_hang_up(&guest->line, NULL);
        free(guest);
    }
    while (shim->callers != NULL) {
        caller_t *caller = shim->callers;
        shim->callers = caller->next;
        free(caller);
    }
    while (shim->barred != NULL) {
        barred_t *barred = shim->barred;
        shim->barred = barred->next;
        free(barred);
    }
    if (shim->door_address != NULL)
        ucp.ucp_worker_release_address(shim->door.worker, shim->door_address);
    line_hang_up(&shim->door, NULL);
}
