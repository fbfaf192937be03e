/* A hook server that misbehaves as it is told to, in the run hook's payload or in the variable PLAN: words such as `suspend=500`.
 *
 * The value is a status, or: hang, close, stream (a body without end, slowly), flood (the same as fast as it goes), headers (a head without
 * end), garbage, exit, deaf (listen no more once the answer is sent). /ready answers 503 the first time, whatever the plan. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static char plan[4096];
static int asked_ready;

#define CHUNKED "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
#define FILLER "X-Filler: filler filler filler filler\r\n"

static void forever(int connection, const char *head, const char *more, int pause_us) {
    if (write(connection, head, strlen(head)) < 0) return;
    while (write(connection, more, strlen(more)) > 0)
        if (pause_us) usleep(pause_us);
}

static void answer(int connection, int listener, const char *hook) {
    char word[64], value[16] = "200", text[128];
    snprintf(word, sizeof word, "%s=", hook);
    char *found = strstr(plan, word);
    if (found) sscanf(found + strlen(word), "%15[a-z0-9]", value);
    if (!strcmp(hook, "ready") && !asked_ready++) strcpy(value, "503");
    printf("%s %s\n", hook, value);
    fflush(stdout);
    if (!strcmp(value, "hang")) for (;;) pause();
    if (!strcmp(value, "exit")) exit(7);
    if (!strcmp(value, "stream")) forever(connection, CHUNKED, "1\r\nx\r\n", 10000);
    if (!strcmp(value, "flood")) {
        static char chunk[4200];
        snprintf(chunk, sizeof chunk, "1000\r\n%04096d\r\n", 0);
        forever(connection, CHUNKED, chunk, 0);
    }
    if (!strcmp(value, "headers")) forever(connection, "HTTP/1.1 200 OK\r\n", FILLER, 0);
    if (!strcmp(value, "garbage")) { if (write(connection, "SSH-2.0-nonsense\r\n", 18) < 0) return; }
    int deaf = !strcmp(value, "deaf"), status = deaf ? 200 : atoi(value);
    if (deaf) close(listener);
    if (status) {
        int length = snprintf(text, sizeof text, "HTTP/1.1 %d Said\r\n%s", status, status == 204 ? "\r\n" : "Content-Length: 2\r\n\r\nok");
        if (write(connection, text, length) < 0) return;
    }
    close(connection);
    if (deaf) for (;;) pause();
}

static void read_request(int connection, char *request, size_t size) {
    size_t have = 0;
    char *end, *length;
    request[0] = 0;
    while (have + 1 < size) {
        ssize_t count = read(connection, request + have, size - have - 1);
        if (count <= 0) return;
        have += count;
        request[have] = 0;
        if (!(end = strstr(request, "\r\n\r\n"))) continue;
        length = strcasestr(request, "content-length:");
        if (have >= (size_t)(end + 4 - request) + (length ? atoi(length + 15) : 0)) return;
    }
}

int main(void) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(9000), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int listener = socket(AF_INET, SOCK_STREAM, 0), on = 1;
    char request[8192], hook[32];
    signal(SIGPIPE, SIG_IGN);
    if (getenv("PLAN")) snprintf(plan, sizeof plan, "%s", getenv("PLAN"));
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 16)) return 1;
    for (;;) {
        int connection = accept(listener, NULL, NULL);
        if (connection < 0) return 1;
        read_request(connection, request, sizeof request);
        if (sscanf(request, "POST /aws/lambda-microvms/runtime/v1/%31[a-z] HTTP/1.1", hook) != 1) { close(connection); continue; }
        if (!strcmp(hook, "run")) snprintf(plan, sizeof plan, "%.4000s", request);
        answer(connection, listener, hook);
    }
}
