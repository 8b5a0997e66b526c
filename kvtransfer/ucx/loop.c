/* The one thread that talks to UCX: turns while there is work, spins for a moment, then sleeps on UCX's descriptors. */

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "shim.h"

#define SPIN_NS (INT64_C(50000))
#define NAP_NS (100 * MS)
#define GPU_LOOK_NS (INT64_C(50000))                 /* between looks at whether pages have been computed: the GPU does not tell */

int64_t now_ns(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

int say(char *text, int code, const char *what, const char *why)
{
    snprintf(text, TEXT_BYTES, "%.100s: %.150s", what, why);
    return code;
}

void wake(shim_t *shim)
{
    uint64_t one = 1;
    if (write(shim->wake_fd, &one, sizeof one) < 0)
        return;                                       /* the counter is full: it is awake */
}

/* Waits for a change until the deadline; false once it has passed. Under the lock. */
bool wait_changed(shim_t *shim, int64_t deadline_ns)
{
    struct timespec deadline = {deadline_ns / INT64_C(1000000000), deadline_ns % INT64_C(1000000000)};
    return pthread_cond_timedwait(&shim->changed, &shim->lock, &deadline) != ETIMEDOUT;
}

static int arm(line_t *line, struct pollfd *fd)
{
    fd->fd = line->efd;
    fd->events = POLLIN;
    return ucp.ucp_worker_arm(line->worker) == UCS_OK;
}

/* Sleeps until UCX or a caller has something; deadlines and keep-alives make do with a look every NAP_NS. */
static void nap(shim_t *shim, link_t *links)
{
    size_t num_lines = 2, used = 0;
    struct timespec patience = {.tv_nsec = NAP_NS};
    for (guest_t *guest = shim->guests; guest != NULL; guest = guest->next)
        num_lines++;
    for (link_t *link = links; link != NULL; link = link->next) {
        num_lines += 2;
        if (link->awaits_gpu)
            patience.tv_nsec = GPU_LOOK_NS;
    }
    struct pollfd fds[num_lines];
    fds[used++] = (struct pollfd){.fd = shim->wake_fd, .events = POLLIN};
    if (!arm(&shim->door, &fds[used++]))
        return;
    for (guest_t *guest = shim->guests; guest != NULL; guest = guest->next)
        if (!arm(&guest->line, &fds[used++]))
            return;
    for (link_t *link = links; link != NULL; link = link->next)
        if (link->line.worker != NULL && (!arm(&link->call, &fds[used++]) || !arm(&link->line, &fds[used++])))
            return;
    uint64_t woken;
    if (ppoll(fds, used, &patience, NULL) > 0 && fds[0].revents != 0 && read(shim->wake_fd, &woken, sizeof woken) < 0)
        return;
}

static void drop_closed_links(shim_t *shim)
{
    pthread_mutex_lock(&shim->lock);
    for (link_t **at = &shim->links; *at != NULL;) {
        link_t *link = *at;
        if (link->state == LINK_CLOSED) {
            *at = link->next;
            link_free(link);
            pthread_cond_broadcast(&shim->changed);
        } else
            at = &link->next;
    }
    pthread_mutex_unlock(&shim->lock);
}

static void *run(void *arg)
{
    shim_t *shim = arg;
    int64_t idle_since = now_ns();
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, NULL);           /* they are for Python's threads */
    pthread_setname_np(pthread_self(), "diptych-ucx");
    gpu_enter(&shim->gpu);
    for (;;) {
        pthread_mutex_lock(&shim->lock);
        bool closing = shim->closing;
        link_t *links = shim->links;
        pthread_mutex_unlock(&shim->lock);
        if (closing)
            break;
        unsigned worked = receiver_turn(shim);
        bool closed = false;
        for (link_t *link = links; link != NULL; link = link->next) {
            worked += link_turn(link);
            closed |= link->state == LINK_CLOSED;
        }
        if (closed)
            drop_closed_links(shim);
        else if (worked)
            idle_since = now_ns();
        else if (now_ns() - idle_since > SPIN_NS)
            nap(shim, links);
    }
    for (link_t *link = shim->links; link != NULL; link = link->next)
        link_leave(link);
    receiver_close(shim);
    return NULL;
}

EXPORT int dx_start(shim_t *shim, char *text)
{
    ucs_status_t status = door_open(shim);
    if (status != UCS_OK)
        return say(text, DX_FAILED, "ucp_worker_create", ucp.ucs_status_string(status));
    int error = pthread_create(&shim->thread, NULL, run, shim);
    if (error != 0)
        return say(text, DX_FAILED, "pthread_create", strerror(error));
    shim->running = true;
    return DX_OK;
}

EXPORT void dx_close(shim_t *shim)
{
    pthread_mutex_lock(&shim->lock);
    shim->closing = true;
    pthread_mutex_unlock(&shim->lock);
    if (shim->running) {
        wake(shim);
        pthread_join(shim->thread, NULL);
        shim->running = false;
    }
    while (shim->links != NULL) {
        link_t *link = shim->links;
        shim->links = link->next;
        link_free(link);
    }
}
