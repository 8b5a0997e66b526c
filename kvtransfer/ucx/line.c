/* A line: one UCX worker with its endpoint, opened, used and torn down as a whole. Only the shim's thread comes here. */

#include <stdlib.h>
#include <string.h>

#include "shim.h"

#define HANG_UP_LIMIT_NS (1000 * MS)

ucs_status_t line_open(ucp_context_h context, line_t *line)
{
    ucp_worker_params_t params = {
        .field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE | UCP_WORKER_PARAM_FIELD_FLAGS,
        .thread_mode = UCS_THREAD_MODE_SERIALIZED,
        .flags = UCP_WORKER_FLAG_IGNORE_REQUEST_LEAK,
    };
    memset(line, 0, sizeof *line);
    ucs_status_t status = ucp.ucp_worker_create(context, &params, &line->worker);
    if (status != UCS_OK) {
        line->worker = NULL;
        return status;
    }
    status = ucp.ucp_worker_get_efd(line->worker, &line->efd);
    if (status != UCS_OK)
        line_hang_up(line, NULL);
    return status;
}

static void note_fault(void *arg, ucp_ep_h ep, ucs_status_t status)
{
    (void)ep;
    line_t *line = arg;
    if (line->fault == 0)
        line->fault = status;
}

ucs_status_t line_dial(line_t *line, const void *address)
{
    ucp_ep_params_t params = {
        .field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE | UCP_EP_PARAM_FIELD_ERR_HANDLER,
        .address = address,
        .err_mode = UCP_ERR_HANDLING_MODE_PEER,
        .err_handler = {note_fault, line},
    };
    ucs_status_t status = ucp.ucp_ep_create(line->worker, &params, &line->ep);
    if (status != UCS_OK)
        line->ep = NULL;
    return status;
}

ucs_status_t line_listen(line_t *line, unsigned id, ucp_am_recv_callback_t callback, void *arg)
{
    ucp_am_handler_param_t params = {
        .field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_CB | UCP_AM_HANDLER_PARAM_FIELD_ARG,
        .id = id,
        .cb = callback,
        .arg = arg,
    };
    return ucp.ucp_worker_set_am_recv_handler(line->worker, &params);
}

ucs_status_t line_address(line_t *line, ucp_address_t **address, size_t *num_bytes)
{
    ucp_worker_attr_t attr = {.field_mask = UCP_WORKER_ATTR_FIELD_ADDRESS};
    ucs_status_t status = ucp.ucp_worker_query(line->worker, &attr);
    *address = attr.address;
    *num_bytes = attr.address_length;
    return status;
}

typedef struct {
    line_t *line;
    uint8_t bytes[];
} letter_t;

static void letter_sent(void *request, ucs_status_t status, void *user_data)
{
    letter_t *letter = user_data;
    if (status != UCS_OK)
        note_fault(letter->line, NULL, status);
    free(letter);
    if (request != NULL)
        ucp.ucp_request_free(request);
}

/* A failure to send is a fault of the line. */
void line_send(line_t *line, unsigned id, const void *header, size_t header_bytes, const void *body, size_t body_bytes)
{
    letter_t *letter = malloc(sizeof *letter + header_bytes + body_bytes);
    if (letter == NULL) {
        note_fault(line, line->ep, UCS_ERR_NO_MEMORY);
        return;
    }
    letter->line = line;
    memcpy(letter->bytes, header, header_bytes);
    if (body_bytes > 0)
        memcpy(letter->bytes + header_bytes, body, body_bytes);
    ucp_request_param_t params = {
        .op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_FLAGS,
        .flags = UCP_AM_SEND_FLAG_EAGER,
        .cb.send = letter_sent,
        .user_data = letter,
    };
    ucs_status_ptr_t request = ucp.ucp_am_send_nbx(line->ep, id, letter->bytes, header_bytes, letter->bytes + header_bytes, body_bytes, &params);
    if (!UCS_PTR_IS_PTR(request))
        letter_sent(NULL, UCS_PTR_STATUS(request), letter);
}

/* Progresses until the request has ended, for a limited time. */
void line_settle(line_t *line, ucs_status_ptr_t request, int64_t limit_ns)
{
    if (!UCS_PTR_IS_PTR(request))
        return;
    int64_t deadline_ns = now_ns() + limit_ns;
    while (ucp.ucp_request_check_status(request) == UCS_INPROGRESS && now_ns() < deadline_ns)
        ucp.ucp_worker_progress(line->worker);
    ucp.ucp_request_free(request);
}

/* The endpoint is closed by force: whatever is under way ends with an error, now. */
void line_hang_up(line_t *line, ucp_rkey_h rkey)
{
    if (line->worker == NULL)
        return;
    ucp_request_param_t params = {.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS, .flags = UCP_EP_CLOSE_FLAG_FORCE};
    if (line->ep != NULL)
        line_settle(line, ucp.ucp_ep_close_nbx(line->ep, &params), HANG_UP_LIMIT_NS);
    line->ep = NULL;
    if (rkey != NULL)
        ucp.ucp_rkey_destroy(rkey);
    ucp.ucp_worker_destroy(line->worker);
    line->worker = NULL;
}
