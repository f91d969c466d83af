/* SPDX-License-Identifier: Apache-2.0 */
/* Default number of threads: physical cores of the affinity mask, at most the cgroups' CPU quota. */
#include <limits.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/cpu.h"

#if defined(__linux__)
#include <sched.h>

static FILE *open_under(const char *root, const char *path)
{
    char name[PATH_MAX];
    const int n = snprintf(name, sizeof name, "%s%s", root, path);
    return n > 0 && (size_t)n < sizeof name ? fopen(name, "r") : NULL;
}

/* ---- cores ------------------------------------------------------------------------------------------------------- */

static bool is_allowed(const int *cpus, int n, long cpu)
{
    int i = 0;
    while (i < n && cpus[i] != cpu)
        i++;
    return i < n;
}

/* Whether `siblings`, a list like "0,4" or "0-1", names an allowed CPU before `cpu`, which then counts for the core. */
static bool has_earlier_sibling(const char *siblings, const int *cpus, int n, int cpu)
{
    for (char *end; *siblings; siblings = end) {
        const long first = strtol(siblings, &end, 10);
        if (end == siblings)
            return false;
        const long last = *end == '-' ? strtol(end + 1, &end, 10) : first;
        for (long other = first; other <= last && other < cpu; other++)
            if (is_allowed(cpus, n, other))
                return true;
        end += *end == ',';
    }
    return false;
}

int g4_cpu_cores(const char *root, const int *cpus, int n)
{
    int n_cores = 0;
    for (int i = 0; i < n; i++) {
        char path[96], siblings[256] = "";
        snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", cpus[i]);
        FILE *file = open_under(root, path);
        if (file) {
            if (!fgets(siblings, sizeof siblings, file))
                siblings[0] = '\0';
            fclose(file);
        }
        n_cores += !has_earlier_sibling(siblings, cpus, n, cpus[i]);
    }
    return n_cores;
}

/* ---- quota ------------------------------------------------------------------------------------------------------- */

/* A cgroup hierarchy with CPU limits: the only one of version 2, or that of version 1's controller "cpu". */
typedef struct {
    bool v2;
    char mount[PATH_MAX]; /* mount point */
    char root[PATH_MAX];  /* path of the cgroup mounted there */
} hierarchy;

static bool has_item(const char *list, const char *item)
{
    const size_t n = strlen(item);
    for (const char *at = list; (at = strstr(at, item)); at += n)
        if ((at == list || at[-1] == ',') && (at[n] == ',' || at[n] == '\0'))
            return true;
    return false;
}

/* mountinfo writes blanks, tabs, newlines and backslashes as three octal digits. */
static void unescape(char *text)
{
    char *to = text;
    for (const char *from = text; *from; to++) {
        const bool octal = from[0] == '\\' && from[1] >= '0' && from[1] <= '3' && from[2] && from[3];
        *to = octal ? (char)((from[1] - '0') << 6 | (from[2] - '0') << 3 | (from[3] - '0')) : *from;
        from += octal ? 4 : 1;
    }
    *to = '\0';
}

/* Line of mountinfo: id, parent, device, root, mount point, options, optional fields, "-", type, source, options. */
static bool parse_mount(char *line, hierarchy *h)
{
    char *fields[5], *rest = line, *tail = strstr(line, " - ");
    if (!tail)
        return false;
    *tail = '\0';
    tail[strcspn(tail + 1, "\n") + 1] = '\0';
    for (int i = 0; i < 5; i++)
        if (!(fields[i] = strsep(&rest, " ")))
            return false;
    tail += 3;
    const char *type = strsep(&tail, " ");
    const char *options = tail ? (strsep(&tail, " "), tail) : NULL;
    const bool fits =
        h->v2 ? strcmp(type, "cgroup2") == 0 : strcmp(type, "cgroup") == 0 && options && has_item(options, "cpu");
    if (!fits || strlen(fields[3]) >= sizeof h->root || strlen(fields[4]) >= sizeof h->mount)
        return false;
    unescape(strcpy(h->root, fields[3]));
    unescape(strcpy(h->mount, fields[4]));
    return true;
}

/* The rest of `path` below the cgroup that is mounted, or NULL if it lies elsewhere. */
static const char *path_inside(const hierarchy *h, const char *path)
{
    const size_t n_root = strcmp(h->root, "/") == 0 ? 0 : strlen(h->root);
    const bool inside = strncmp(path, h->root, n_root) == 0 && (path[n_root] == '/' || path[n_root] == '\0');
    return inside ? path + n_root : NULL;
}

/* Containers bind several mounts: the first that holds the cgroup at `path` is taken, else the first of all. */
static bool find_mount(const char *root, hierarchy *h, const char *path)
{
    FILE *file = open_under(root, "/proc/self/mountinfo");
    char *line = NULL;
    size_t size = 0;
    bool found = false, holds = false;
    while (file && !holds && getline(&line, &size, file) > 0) {
        hierarchy mount = {.v2 = h->v2};
        if (!parse_mount(line, &mount))
            continue;
        holds = path_inside(&mount, path) != NULL;
        if (!found || holds)
            *h = mount;
        found = true;
    }
    free(line);
    if (file)
        fclose(file);
    return found;
}

/* Reads a number from a file of one cgroup. -1: "max", not a number, or no such file. */
static long long read_number(const char *group, const char *name, long long *second)
{
    long long first = -1;
    FILE *file = open_under(group, name);
    if (!file)
        return -1;
    if (fscanf(file, "%lld %lld", &first, second ? second : &(long long){0}) < 1)
        first = -1;
    fclose(file);
    return first;
}

/* CPU time that one cgroup grants, in CPUs, rounded up; 0: no limit. */
static long long quota_of(const char *group, bool v2)
{
    long long period = -1, quota;
    if (v2) {
        quota = read_number(group, "/cpu.max", &period);
    } else {
        quota = read_number(group, "/cpu.cfs_quota_us", NULL);
        period = read_number(group, "/cpu.cfs_period_us", NULL);
    }
    return quota > 0 && period > 0 ? quota / period + (quota % period != 0) : 0;
}

static long long tighter(long long a, long long b)
{
    return !a || (b && b < a) ? b : a;
}

/* The tightest limit of the cgroup at `path` and of its ancestors that are visible in the mount. */
static long long quota_in(const char *root, const hierarchy *h, const char *path)
{
    char group[PATH_MAX];
    const char *inside = path_inside(h, path);
    const int n_mount = snprintf(group, sizeof group, "%s%s", root, h->mount);
    const int n = snprintf(group, sizeof group, "%s%s%s", root, h->mount, inside ? inside : "");
    if (n < 0 || (size_t)n >= sizeof group)
        return 0;
    long long least = quota_of(group, h->v2);
    for (char *slash; (slash = strrchr(group, '/')) && slash - group >= n_mount;) {
        *slash = '\0';
        least = tighter(least, quota_of(group, h->v2));
    }
    return least;
}

/* Line of /proc/self/cgroup: "id:controllers:path". Version 2 is "0::path". */
static long long quota_of_line(const char *root, char *line)
{
    hierarchy h = {0};
    line[strcspn(line, "\n")] = '\0';
    const char *id = strsep(&line, ":"), *controllers = strsep(&line, ":");
    if (!line)
        return 0;
    h.v2 = strcmp(id, "0") == 0 && !*controllers;
    if (!h.v2 && !has_item(controllers, "cpu"))
        return 0;
    return find_mount(root, &h, line) ? quota_in(root, &h, line) : 0;
}

int g4_cpu_quota(const char *root)
{
    FILE *file = open_under(root, "/proc/self/cgroup");
    char *line = NULL;
    size_t size = 0;
    long long least = 0;
    while (file && getline(&line, &size, file) > 0)
        least = tighter(least, quota_of_line(root, line));
    free(line);
    if (file)
        fclose(file);
    return least < INT_MAX ? (int)least : INT_MAX;
}

/* ---- both -------------------------------------------------------------------------------------------------------- */

/* The CPUs of the affinity mask; the caller frees the array. NULL: unknown. */
static int *allowed_cpus(int *n)
{
    for (int size = CPU_SETSIZE; size <= 64 * CPU_SETSIZE; size *= 2) { /* the kernel's mask may be larger */
        cpu_set_t *set = CPU_ALLOC((size_t)size);
        const size_t n_bytes = CPU_ALLOC_SIZE((size_t)size);
        const bool fits = set && sched_getaffinity(0, n_bytes, set) == 0;
        int *cpus = fits ? malloc((size_t)size * sizeof *cpus) : NULL;
        *n = 0;
        for (int i = 0; cpus && i < size; i++)
            if (CPU_ISSET_S((size_t)i, n_bytes, set))
                cpus[(*n)++] = i;
        if (set)
            CPU_FREE(set);
        if (fits)
            return cpus;
    }
    return NULL;
}

int g4_cpu_count(void)
{
    int n, count = (int)sysconf(_SC_NPROCESSORS_ONLN);
    int *cpus = allowed_cpus(&n);
    if (cpus)
        count = g4_cpu_cores("", cpus, n);
    free(cpus);
    const int quota = g4_cpu_quota("");
    if (quota && quota < count)
        count = quota;
    return count > 0 ? count : 1;
}
#else
int g4_cpu_cores(const char *root, const int *cpus, int n)
{
    (void)root, (void)cpus;
    return n;
}

int g4_cpu_quota(const char *root)
{
    (void)root;
    return 0;
}

int g4_cpu_count(void)
{
    long online = sysconf(_SC_NPROCESSORS_ONLN);
    return online > 0 ? (int)online : 1;
}
#endif
