/* sandbox.c - namespaces, limits and a filter around one process. */
#include "eval/sandbox.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PYTHON "/usr/bin/python3"

/* What the child says when it could not be shut in; no program ends so by itself. */
#define NOT_CONTAINED 213

SandboxLimits sandbox_limits_default(void) {
    return (SandboxLimits){.seconds = 10,
                           .memory = (int64_t)1 << 30,
                           .files = (int64_t)16 << 20,
                           .output = (int64_t)1 << 20};
}

/* ---- within the child ---- */

static void write_to(const char *path, const char *text) {
    int fd = open(path, O_WRONLY);
    if (fd < 0) return;
    ssize_t ignored = write(fd, text, strlen(text));
    (void)ignored;
    close(fd);
}

/* A folder of the system, read-only, at the same place below root. Links stay links. */
static bool lend(const char *root, const char *path) {
    char at[256], target[256];
    struct stat info;
    struct statvfs flags;
    snprintf(at, sizeof at, "%s%s", root, path);
    if (lstat(path, &info)) return true; /* not every system has it */
    if (S_ISLNK(info.st_mode)) {
        ssize_t n = readlink(path, target, sizeof target - 1);
        if (n < 0) return false;
        target[n] = 0;
        return !symlink(target, at);
    }
    if (S_ISDIR(info.st_mode)) {
        if (mkdir(at, 0755)) return false;
    } else {
        int fd = open(at, O_WRONLY | O_CREAT, 0644);
        if (fd < 0) return false;
        close(fd);
    }
    if (mount(path, at, NULL, MS_BIND | MS_REC, NULL)) return false;
    if (statvfs(at, &flags)) return false;
    unsigned long kept = MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID;
    if (flags.f_flag & ST_NODEV) kept |= MS_NODEV;
    if (flags.f_flag & ST_NOEXEC) kept |= MS_NOEXEC;
    if (flags.f_flag & ST_NOATIME) kept |= MS_NOATIME;
    if (flags.f_flag & ST_RELATIME) kept |= MS_RELATIME;
    return !mount(NULL, at, NULL, kept, NULL);
}

static bool new_root(const SandboxLimits *limits, Slice program) {
    static const char *const lent[] = {"/usr", "/bin", "/lib", "/lib64", "/lib32"};
    static const char *const devices[] = {"/dev/null", "/dev/zero", "/dev/urandom"};
    const char *root = "/tmp"; /* covered here only; nothing of it is seen or left */
    char at[64], size[64];
    if (mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL)) return false;
    snprintf(size, sizeof size, "size=%lld,mode=755", (long long)limits->files);
    if (mount("sandbox", root, "tmpfs", MS_NOSUID | MS_NODEV, size)) return false;
    for (size_t i = 0; i < sizeof lent / sizeof *lent; i++)
        if (!lend(root, lent[i])) return false;
    snprintf(at, sizeof at, "%s/dev", root);
    mkdir(at, 0755);
    for (size_t i = 0; i < sizeof devices / sizeof *devices; i++) lend(root, devices[i]);
    snprintf(at, sizeof at, "%s/tmp", root);
    mkdir(at, 0777);
    snprintf(at, sizeof at, "%s/tmp/program.py", root);
    int fd = open(at, O_WRONLY | O_CREAT | O_TRUNC, 0644);
    if (fd < 0 || write(fd, program.bytes, program.size) != (ssize_t)program.size) return false;
    close(fd);
    if (chdir(root) || syscall(SYS_pivot_root, ".", ".") || umount2(".", MNT_DETACH)) return false;
    return !chdir("/tmp");
}

static void limit(int what, int64_t most) {
    struct rlimit r = {(rlim_t)most, (rlim_t)most};
    setrlimit(what, &r);
}

/* New processes are denied (threads are not), and so are sockets, mounts and looking into others.
 */
static bool filter_calls(void) {
#define LOAD(field) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field))
#define DENY(call)                                                                                 \
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_##call, 0, 1),                                        \
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM)
    struct sock_filter code[] = {
        LOAD(nr),
#ifdef __NR_fork
        DENY(fork),
        DENY(vfork),
#endif
        DENY(socket),
        DENY(socketpair),
        DENY(mount),
        DENY(umount2),
        DENY(pivot_root),
        DENY(unshare),
        DENY(setns),
        DENY(ptrace),
        DENY(bpf),
        DENY(keyctl),
        DENY(add_key),
        DENY(process_vm_readv),
        DENY(io_uring_setup),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_clone3, 0, 1), /* then clone is asked, below */
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | ENOSYS),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_clone, 0, 3),
        LOAD(args[0]),
        BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, CLONE_THREAD, 1, 0),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
    struct sock_fprog filter = {sizeof code / sizeof *code, code};
    return !prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) &&
           !prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter);
}

/* Process 1 of its own world. */
static _Noreturn void run_inside(Slice program, const SandboxLimits *limits) {
    char *words[] = {PYTHON, "-I", "-B", "/tmp/program.py", NULL};
    char *environment[] = {"PATH=/usr/bin:/bin",     "HOME=/tmp",
                           "LANG=C.UTF-8",           "OMP_NUM_THREADS=1",
                           "OPENBLAS_NUM_THREADS=1", NULL};
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (!new_root(limits, program)) _exit(NOT_CONTAINED);
    limit(RLIMIT_AS, limits->memory);
    limit(RLIMIT_FSIZE, limits->files);
    limit(RLIMIT_CPU, (int64_t)limits->seconds + 1);
    limit(RLIMIT_NPROC, 64);
    limit(RLIMIT_NOFILE, 64);
    limit(RLIMIT_CORE, 0);
    if (!filter_calls()) _exit(NOT_CONTAINED);
    execve(PYTHON, words, environment);
    _exit(NOT_CONTAINED);
}

static _Noreturn void run_child(Slice program, int in, int out, const SandboxLimits *limits) {
    char map[64];
    uid_t user = getuid();
    gid_t group = getgid();
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    setpgid(0, 0);
    dup2(in, 0);
    dup2(out, 1);
    dup2(out, 2);
    syscall(SYS_close_range, 3u, ~0u, 0u);
    if (unshare(CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC |
                CLONE_NEWUTS))
        _exit(NOT_CONTAINED);
    write_to("/proc/self/setgroups", "deny");
    snprintf(map, sizeof map, "0 %u 1", user);
    write_to("/proc/self/uid_map", map);
    snprintf(map, sizeof map, "0 %u 1", group);
    write_to("/proc/self/gid_map", map);
    pid_t first = fork();
    if (first < 0) _exit(NOT_CONTAINED);
    if (!first) run_inside(program, limits);
    int status;
    while (waitpid(first, &status, 0) < 0 && errno == EINTR) continue;
    _exit(WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
}

/* ---- outside ---- */

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Feeds the program and reads what it prints until it closes its end or its time is up. */
static bool attend(int to, int from, Slice input, const SandboxLimits *limits, Text *output) {
    double until = now() + limits->seconds;
    size_t written = 0;
    char buffer[4096];
    bool open = true;
    if (!input.size) close(to), to = -1;
    while (open) {
        struct pollfd p[] = {{from, POLLIN, 0}, {to, POLLOUT, 0}};
        double left = until - now();
        if (left <= 0) break;
        poll(p, to >= 0 ? 2 : 1, (int)(left * 1000) + 1);
        if (to >= 0 && p[1].revents) {
            ssize_t n = write(to, input.bytes + written, input.size - written);
            if (n > 0) written += (size_t)n;
            if ((n < 0 && errno != EAGAIN && errno != EINTR) || written == input.size)
                close(to), to = -1;
        }
        if (p[0].revents) {
            ssize_t n = read(from, buffer, sizeof buffer);
            open = n > 0 || (n < 0 && (errno == EAGAIN || errno == EINTR));
            int64_t room = limits->output - (int64_t)output->size;
            if (n > 0 && room > 0) text_add(output, buffer, (size_t)(n < room ? n : room));
        }
    }
    if (to >= 0) close(to);
    return !open;
}

Status sandbox_python(SandboxResult *r, Slice program, Slice input, const SandboxLimits *limits) {
    int in[2], out[2], status = 0;
    *r = (SandboxResult){0};
    if (access(PYTHON, X_OK)) FAIL(ERR_CONFIG, "there is no " PYTHON " to run programs with");
    if (pipe2(in, O_CLOEXEC)) FAIL(ERR_IO, "pipe: %s", strerror(errno));
    if (pipe2(out, O_CLOEXEC)) {
        close(in[0]), close(in[1]);
        FAIL(ERR_IO, "pipe: %s", strerror(errno));
    }
    pid_t pid = fork();
    if (!pid) run_child(program, in[0], out[1], limits);
    close(in[0]), close(out[1]);
    fcntl(in[1], F_SETFL, O_NONBLOCK);
    void (*before)(int) = signal(SIGPIPE, SIG_IGN);
    bool closed = pid > 0 && attend(in[1], out[0], input, limits, &r->output);
    double until = now() + 1; /* a program that closed its output may still be at work */
    pid_t ended = 0;
    while (pid > 0 && closed && !(ended = waitpid(pid, &status, WNOHANG)) && now() < until)
        usleep(1000);
    if (pid > 0 && ended != pid) {
        kill(-pid, SIGKILL);
        waitpid(pid, &status, 0);
        r->end = SANDBOX_TIMEOUT;
    } else {
        r->status = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
        r->end = r->status ? SANDBOX_FAILED : SANDBOX_PASSED;
    }
    signal(SIGPIPE, before);
    close(out[0]);
    if (pid < 0) FAIL(ERR_IO, "fork: %s", strerror(errno));
    if (r->end == SANDBOX_FAILED && r->status == NOT_CONTAINED)
        FAIL(ERR_CONFIG, "programs cannot be contained here: the kernel grants no user and mount "
                         "namespaces to this process");
    return OK;
}

void sandbox_free(SandboxResult *r) {
    text_free(&r->output);
}

Status sandbox_check(void) {
    SandboxResult r;
    SandboxLimits limits = sandbox_limits_default();
    TRY(sandbox_python(&r, slice_of("print(6 * 7)"), (Slice){"", 0}, &limits));
    bool good = r.end == SANDBOX_PASSED && slice_is((Slice){r.output.bytes, r.output.size}, "42\n");
    if (!good)
        status_fail(ERR_CONFIG, "programs cannot be run here: a first one says '%.200s'",
                    r.output.bytes ? r.output.bytes : "");
    sandbox_free(&r);
    return good ? OK : ERR_CONFIG;
}
