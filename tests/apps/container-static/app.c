/* The same requests as container/app.py answers, by a program that has nothing around it: no shell, no library, no file but its own.
 *
 * GET /facts, /metadata, /orphan and /fill tell lines of a name and a value; POST /stdout and /stderr write their body there; POST /exit
 * ends with the code in its body, unanswered. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/statvfs.h>
#include <sys/wait.h>
#include <unistd.h>

#define ROLES "/latest/meta-data/iam/security-credentials/"

static char said[64 << 10];
static size_t length;

static void tell(const char *format, ...) {
    va_list values;
    va_start(values, format);
    length += vsnprintf(said + length, sizeof said - length, format, values);
    va_end(values);
    if (length > sizeof said - 1) length = sizeof said - 1;
}

/* The file's beginning, without the newline at its end. */
static char *content(const char *path) {
    static char text[4096];
    int file = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t count = file < 0 ? -1 : read(file, text, sizeof text - 1);
    if (file >= 0) close(file);
    text[count > 0 ? count : 0] = 0;
    if (count > 0 && text[count - 1] == '\n') text[count - 1] = 0;
    return text;
}

/* A field of /proc/self/status. */
static char *field(const char *name) {
    char *value = strstr(content("/proc/self/status"), name);
    return value ? strtok(value + strlen(name), "\n") : "";
}

static const char *outcome(int result) { return result == 0 ? "done" : strerrorname_np(errno); }

static unsigned long kib(const char *path) {
    struct statvfs found;
    return statvfs(path, &found) ? 0 : found.f_blocks * (found.f_frsize / 1024);
}

static void facts(int argc, char **argv, char **environment) {
    char text[256];
    gid_t groups[16];
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    tell("pid %d\narguments %s\n", getpid(), argc == 2 ? argv[1] : "");
    for (; *environment; environment++) {
        char *equals = strchr(*environment, '=');
        tell("env.%.*s %s\n", (int)(equals - *environment), *environment, equals + 1);
    }
    tell("user %d %d", getuid(), getgid());
    for (int count = getgroups(16, groups), at = 0; at < count; at++) tell(" %d", groups[at]);
    gethostname(text, sizeof text);
    tell("\nhost %s\n", text);
    tell("directory %s\nfiles %lu\n", getcwd(text, sizeof text), files.rlim_cur);
    tell("bounding %s\n", field("CapBnd:\t"));
    tell("seccomp %s\n", field("Seccomp:\t"));
    tell("cgroup %s\n", content("/proc/self/cgroup"));
    tell("mount %s\n", outcome(mount("none", "/", "tmpfs", 0, NULL)));
    tell("rename %s\n", outcome(sethostname("renamed", 7)));
    tell("generation %s\n", content("/dev/hearth/generation"));
    tell("shm %lu\ndisk %lu\n", kib("/dev/shm"), kib("/"));
    tell("processors %ld\nmemory %ld\n", sysconf(_SC_NPROCESSORS_ONLN), sysconf(_SC_PHYS_PAGES) * (sysconf(_SC_PAGESIZE) / 1024));
}

/* A request to the metadata address. The answer's body is in `body`, without line ends; its status is returned. */
static int metadata(const char *method, const char *path, const char *header, char *body, size_t size) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(80), .sin_addr.s_addr = inet_addr("169.254.169.254")};
    int connection = socket(AF_INET, SOCK_STREAM, 0);
    char text[8192];
    ssize_t count, have = 0;
    body[0] = 0;
    if (connect(connection, (struct sockaddr *)&address, sizeof address)) { close(connection); return 0; }
    dprintf(connection, "%s %s HTTP/1.1\r\nHost: 169.254.169.254\r\n%sConnection: close\r\n\r\n", method, path, header);
    while ((count = read(connection, text + have, sizeof text - 1 - have)) > 0) have += count;
    close(connection);
    text[have] = 0;
    char *end = strstr(text, "\r\n\r\n");
    if (!end) return 0;
    snprintf(body, size, "%s", end + 4);
    for (char *at = body; *at; at++) if (*at == '\n') *at = ' ';
    return atoi(text + strlen("HTTP/1.1 "));
}

static void credentials(void) {
    char token[512], header[600], body[8192];
    tell("unasked %d\n", metadata("GET", ROLES, "", body, sizeof body));
    metadata("PUT", "/latest/api/token", "X-aws-ec2-metadata-token-ttl-seconds: 60\r\nContent-Length: 0\r\n", token, sizeof token);
    snprintf(header, sizeof header, "X-aws-ec2-metadata-token: %s\r\n", token);
    int status = metadata("GET", ROLES, header, body, sizeof body);
    tell("role %d %s\n", status, body);
    status = metadata("GET", ROLES "execution_role", header, body, sizeof body);
    tell("credentials %d %s\n", status, body);
}

static int zombies(void) {
    DIR *processes = opendir("/proc");
    struct dirent *entry;
    char path[300];
    int found = 0;
    while ((entry = readdir(processes)))
        if (atoi(entry->d_name)) {
            snprintf(path, sizeof path, "/proc/%s/stat", entry->d_name);
            found += strstr(content(path), ") Z ") != NULL;
        }
    closedir(processes);
    return found;
}

/* A process whose parent ends before it. */
static void orphan(void) {
    int status;
    pid_t child = fork();
    if (!child) {
        if (fork()) _exit(0);
        while (getppid() != 1) usleep(1000);
        _exit(3);
    }
    waitpid(child, NULL, 0);
    wait(&status);
    tell("code %d\nzombies %d\n", WEXITSTATUS(status), zombies());
}

/* Takes all room there is, and then some. */
static void fill(void) {
    int file = open("/filler", O_CREAT | O_RDWR | O_CLOEXEC, 0600), error;
    off_t size = 0;
    char page[4096] = {0};
    for (off_t step = 1 << 30; step >= 4096; step /= 2)
        while (!(error = posix_fallocate(file, size, step))) size += step;
    tell("reserve %s\n", strerrorname_np(error));
    tell("write %s\n", outcome(pwrite(file, page, sizeof page, size) == sizeof page ? 0 : -1));
    close(file);
    tell("remove %s\n", outcome(unlink("/filler")));
}

static void put(int file, const char *bytes, size_t count) {
    while (count) {
        ssize_t written = write(file, bytes, count);
        if (written < 0) return;
        bytes += written, count -= written;
    }
}

static void serve(int connection, int argc, char **argv, char **environment) {
    static char request[1 << 20];
    size_t have = 0, expected = 0;
    char *body = NULL, *header;
    while (!body || have < expected) {
        ssize_t count = read(connection, request + have, sizeof request - 1 - have);
        if (count <= 0) return;
        have += count;
        request[have] = 0;
        if (body || !(body = strstr(request, "\r\n\r\n"))) continue;
        body += 4;
        header = strcasestr(request, "content-length:");
        expected = body - request + (header && header < body ? atol(header + 15) : 0);
    }
    length = 0;
    const char *path = strchr(request, ' ') + 1;
    if (!strncmp(path, "/facts ", 7)) facts(argc, argv, environment);
    if (!strncmp(path, "/metadata ", 10)) credentials();
    if (!strncmp(path, "/orphan ", 8)) orphan();
    if (!strncmp(path, "/fill ", 6)) fill();
    if (!strncmp(path, "/stdout ", 8)) put(1, body, request + have - body);
    if (!strncmp(path, "/stderr ", 8)) put(2, body, request + have - body);
    if (!strncmp(path, "/exit ", 6)) exit(atoi(body));
    dprintf(connection, "HTTP/1.1 200 OK\r\nContent-Length: %zu\r\nConnection: close\r\n\r\n", length);
    put(connection, said, length);
}

static void stop(int number) {
    dprintf(1, "signal %d\n", number);
    _exit(0);
}

int main(int argc, char **argv, char **environment) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(5000), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    signal(SIGPIPE, SIG_IGN);
    signal(SIGUSR1, stop);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 16)) return 1;
    for (;;) {
        int connection = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        if (connection < 0) continue;
        serve(connection, argc, argv, environment);
        close(connection);
    }
}
