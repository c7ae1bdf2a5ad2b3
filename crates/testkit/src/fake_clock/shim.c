/* Preloaded into a program: another wall clock, another boot, and a time service that works or not.
 *
 * TEST_CLOCK_SHIFT_S        so far ahead of the real wall clock, in seconds
 * TEST_CLOCK_SYNCHRONISED   1: a time service keeps the clock
 * TEST_CLOCK_BOOT_ID        the file that stands for /proc/sys/kernel/random/boot_id
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/timex.h>
#include <time.h>
#include <unistd.h>

static time_t shift;
static int synchronised;
static const char *boot_id;

__attribute__((constructor)) static void begin(void)
{
    const char *text = getenv("TEST_CLOCK_SHIFT_S");
    shift = text ? atoll(text) : 0;
    text = getenv("TEST_CLOCK_SYNCHRONISED");
    synchronised = text && !strcmp(text, "1");
    boot_id = getenv("TEST_CLOCK_BOOT_ID");
}

int clock_gettime(clockid_t clock, struct timespec *now)
{
    int result = syscall(SYS_clock_gettime, clock, now);
    if (result == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        now->tv_sec += shift;
    return result;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone)
{
    int result = syscall(SYS_gettimeofday, now, zone);
    if (result == 0)
        now->tv_sec += shift;
    return result;
}

time_t time(time_t *to)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (to)
        *to = now.tv_sec;
    return now.tv_sec;
}

int adjtimex(struct timex *about)
{
    int result = syscall(SYS_adjtimex, about);
    if (about->modes == 0)
        about->maxerror = synchronised ? 1000 : 16000000;
    return result;
}

static int opened(const char *path, int flags, mode_t mode)
{
    if (boot_id && path && !strcmp(path, "/proc/sys/kernel/random/boot_id"))
        path = boot_id;
    return syscall(SYS_openat, AT_FDCWD, path, flags, mode);
}

#define OPEN(name)                                                \
    int name(const char *path, int flags, ...)                    \
    {                                                             \
        va_list more;                                             \
        va_start(more, flags);                                    \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0; \
        va_end(more);                                             \
        return opened(path, flags, mode);                         \
    }
OPEN(open)
OPEN(open64)
