/* Preloaded into the agent and its children: counts what they change under one folder, and at a chosen count the disk is
 * full from then on, or everything is killed as if the power had gone.
 *
 * DISK_FAULTS_ROOT is the folder, with a slash at its end. DISK_FAULTS_STATE is a file of four 64-bit numbers that all processes share: the count,
 * the count at which it happens (0: never), what happens (0: the disk is full, 1: a kill), and the first process's id.
 * DISK_FAULTS_LOG, if set, gets a line for every change.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, AT, KILLS, FIRST, FIELDS };
static volatile long *shared;
static const char *root;
static int log_fd = -1;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

__attribute__((constructor)) static void begin(void) {
  const char *state = getenv("DISK_FAULTS_STATE"), *log = getenv("DISK_FAULTS_LOG");
  int fd = state ? REAL(open)(state, O_RDWR) : -1;
  root = getenv("DISK_FAULTS_ROOT");
  if (fd < 0 || !root) return;
  void *place = mmap(NULL, FIELDS * sizeof(long), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  close(fd);
  if (place == MAP_FAILED) return;
  shared = place;
  __sync_bool_compare_and_swap(&shared[FIRST], 0, (long)getpid());
  if (log) log_fd = REAL(open)(log, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0644);
}

/* Whether the change of `path` must fail; does not return if it is the one to be killed at. */
static int fails(const char *what, const char *path, int frees) {
  if (!shared || !path || strncmp(path, root, strlen(root)) != 0) return 0;
  if (frees && !shared[KILLS]) return 0; /* a full disk still lets files be removed */
  long number = __sync_add_and_fetch(&shared[COUNT], 1);
  if (log_fd >= 0) dprintf(log_fd, "%ld %s %s\n", number, what, path + strlen(root));
  if (shared[AT] == 0 || number < shared[AT]) return 0;
  if (shared[KILLS]) {
    kill((pid_t)shared[FIRST], SIGKILL);
    kill(getpid(), SIGKILL);
  }
  errno = ENOSPC;
  return 1;
}

/* The same for what the descriptor `fd` stands for, or `name` in that folder. */
static int fails_at(const char *what, int fd, const char *name, int frees) {
  char link[64], path[4096];
  if (!shared) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t size = readlink(link, path, sizeof path / 2);
  if (size < 0) return 0;
  snprintf(path + size, sizeof path - size, "%s%.2000s", name ? "/" : "", name ? name : "");
  return fails(what, path, frees);
}

#define OPENER(name)                                                                   \
  int name(const char *path, int flags, ...) {                                         \
    mode_t mode = 0;                                                                   \
    if (flags & O_CREAT) {                                                             \
      va_list rest;                                                                    \
      va_start(rest, flags);                                                           \
      mode = va_arg(rest, mode_t);                                                     \
      va_end(rest);                                                                    \
    }                                                                                  \
    if ((flags & O_CREAT) && access(path, F_OK) != 0 && fails("create", path, 0)) return -1; \
    return REAL(name)(path, flags, mode);                                              \
  }
OPENER(open)
OPENER(open64)

ssize_t write(int fd, const void *data, size_t size) {
  return fails_at("write", fd, NULL, 0) ? -1 : REAL(write)(fd, data, size);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
  return fails_at("write", fd, NULL, 0) ? -1 : REAL(pwrite)(fd, data, size, at);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
  return fails_at("write", fd, NULL, 0) ? -1 : REAL(pwrite64)(fd, data, size, at);
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
  return fails_at("write", fd, NULL, 0) ? -1 : REAL(writev)(fd, parts, count);
}
int mkdir(const char *path, mode_t mode) {
  if (access(path, F_OK) != 0 && fails("mkdir", path, 0)) return -1;
  return REAL(mkdir)(path, mode);
}
int rename(const char *from, const char *to) { return fails("rename", to, 1) ? -1 : REAL(rename)(from, to); }
int symlink(const char *target, const char *path) { return fails("symlink", path, 0) ? -1 : REAL(symlink)(target, path); }
int unlink(const char *path) { return fails("unlink", path, 1) ? -1 : REAL(unlink)(path); }
int unlinkat(int folder, const char *name, int flags) {
  return fails_at("unlink", folder, name, 1) ? -1 : REAL(unlinkat)(folder, name, flags);
}
int rmdir(const char *path) { return fails("rmdir", path, 1) ? -1 : REAL(rmdir)(path); }
