/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file topology.c
 * The cores this process may use, their caches, and the CPU time its cgroup leaves it.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __linux__
#include <sched.h>
#endif
#ifdef SEBP_HAVE_HWLOC
#include <hwloc.h>
#endif

#include "cpu.h"

enum { ASSUMED_L2 = 512 << 10, PATH_BYTES = 4096 };

/* ---- the mask ---- */

/* The CPUs that this process may use. */
typedef struct cpu_boundary {
    int max; /* how many of them it may use at once; 0: all */
#ifdef __linux__
    cpu_set_t mask[SEBP_MASK_SETS];
#endif
} cpu_boundary;

#ifdef __linux__

#if defined _OPENMP && _OPENMP >= 201511

/* Puts the CPUs of an OpenMP place into `mask`. false: it has none, or more than a mask holds. */
static bool read_place(int place, cpu_set_t *mask, size_t mask_bytes)
{
    int cpus[SEBP_MASK_SETS * CPU_SETSIZE];
    int count = omp_get_place_num_procs(place);
    CPU_ZERO_S(mask_bytes, mask);
    if (count <= 0 || count > SEBP_MASK_SETS * CPU_SETSIZE)
        return false;
    omp_get_place_proc_ids(place, cpus);
    for (int i = 0; i < count; i++)
        CPU_SET_S((size_t)cpus[i], mask_bytes, mask);
    return true;
}

/*
 * Variables such as OMP_PROC_BIND make OpenMP bind the thread that loads it. The mask of this
 * thread is then one of OpenMP's places and says nothing about the process, which has all of them.
 * The list of places may name CPUs that the process was never given, so the number of CPUs is at
 * most what OpenMP counts.
 */
static void widen_to_places(cpu_boundary *boundary)
{
    cpu_set_t place[SEBP_MASK_SETS], all[SEBP_MASK_SETS];
    bool is_place = false;
    CPU_ZERO_S(sizeof all, all);
    for (int i = 0; i < omp_get_num_places(); i++) {
        if (!read_place(i, place, sizeof place))
            continue;
        is_place = is_place || CPU_EQUAL_S(sizeof place, place, boundary->mask);
        CPU_OR_S(sizeof all, all, all, place);
    }
    if (is_place) {
        memcpy(boundary->mask, all, sizeof all);
        boundary->max = omp_get_num_procs();
    }
}

#else

static void widen_to_places(cpu_boundary *boundary)
{
    (void)boundary;
}

#endif

static void read_boundary(cpu_boundary *boundary)
{
    boundary->max = 0;
    CPU_ZERO_S(sizeof boundary->mask, boundary->mask);
    sched_getaffinity(0, sizeof boundary->mask, boundary->mask);
    widen_to_places(boundary);
}

#else

static void read_boundary(cpu_boundary *boundary)
{
    boundary->max = 0;
}

#endif

/* ---- the operating system's own files ---- */

#ifdef __linux__

/* The first line of a file, without its end; false: there is none. */
static bool read_line(const char *path, char *line, int bytes)
{
    FILE *file = fopen(path, "re");
    if (file == NULL)
        return false;
    bool read = fgets(line, bytes, file) != NULL;
    fclose(file);
    if (read)
        line[strcspn(line, "\n")] = '\0';
    return read;
}

/* CPUs' worth of time that the cgroup `folder` grants; 0: no limit. */
static double folder_quota(const char *folder)
{
    char path[PATH_BYTES + 32], line[64];
    double quota = 0, period = 0;
    snprintf(path, sizeof path, "%s/cpu.max", folder);
    if (read_line(path, line, sizeof line))
        return sscanf(line, "%lf %lf", &quota, &period) == 2 && period > 0 ? quota / period : 0;
    snprintf(path, sizeof path, "%s/cpu.cfs_quota_us", folder);
    if (!read_line(path, line, sizeof line) || sscanf(line, "%lf", &quota) != 1 || quota <= 0)
        return 0;
    snprintf(path, sizeof path, "%s/cpu.cfs_period_us", folder);
    if (!read_line(path, line, sizeof line) || sscanf(line, "%lf", &period) != 1 || period <= 0)
        return 0;
    return quota / period;
}

/* The tightest limit from a cgroup up to the root of its hierarchy; 0: none. Inside a container the
 * lower folders may be hidden; then the root is the container's own. */
static double hierarchy_quota(const char *mount, const char *cgroup)
{
    char folder[PATH_BYTES];
    double tightest = 0;
    size_t root = strlen(mount);
    if (snprintf(folder, sizeof folder, "%s%s", mount, cgroup) >= (int)sizeof folder)
        return 0;
    for (;;) {
        double quota = folder_quota(folder);
        if (quota > 0 && (tightest == 0 || quota < tightest))
            tightest = quota;
        char *last = strrchr(folder, '/');
        if (last == NULL || (size_t)(last - folder) < root)
            return tightest;
        *last = '\0';
    }
}

/* Whether `name` is in a comma-separated list. */
static bool is_listed(const char *list, const char *name)
{
    size_t bytes = strlen(name);
    for (const char *at = list; at != NULL; at = strchr(at, ',')) {
        at += *at == ',';
        if (strncmp(at, name, bytes) == 0 && (at[bytes] == ',' || at[bytes] == '\0'))
            return true;
    }
    return false;
}

/* Lines are "0::/folder" for version 2 and "4:cpu,cpuacct:/folder" for version 1. */
static double read_cpu_quota(void)
{
    FILE *file = fopen("/proc/self/cgroup", "re");
    if (file == NULL)
        return 0;
    char line[PATH_BYTES];
    double tightest = 0;
    while (fgets(line, sizeof line, file) != NULL) {
        line[strcspn(line, "\n")] = '\0';
        char *controllers = strchr(line, ':');
        char *folder = controllers != NULL ? strchr(controllers + 1, ':') : NULL;
        if (folder == NULL)
            continue;
        controllers++;
        *folder++ = '\0';
        double quota = 0;
        if (*controllers == '\0')
            quota = hierarchy_quota("/sys/fs/cgroup", folder);
        else if (is_listed(controllers, "cpu"))
            quota = hierarchy_quota("/sys/fs/cgroup/cpu", folder);
        if (quota > 0 && (tightest == 0 || quota < tightest))
            tightest = quota;
    }
    fclose(file);
    return tightest;
}

/* Data caches of a CPU. */
static void read_caches(int cpu, sebp_topology *topology)
{
    char path[128], line[64];
    for (int index = 0;; index++) {
        int level = 0;
        size_t kib = 0;
        int length =
            snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/cache/index%d/", cpu, index);
        char *name = path + length;
        size_t room = sizeof path - (size_t)length;
        snprintf(name, room, "level");
        if (!read_line(path, line, sizeof line) || sscanf(line, "%d", &level) != 1)
            return;
        snprintf(name, room, "size");
        if (!read_line(path, line, sizeof line) || sscanf(line, "%zuK", &kib) != 1)
            continue;
        if (level == 2)
            topology->l2_bytes = kib << 10;
        if (level == 3)
            topology->l3_bytes = kib << 10;
    }
}

/* Whether a CPU is the first of its core's that this process may use. */
static bool is_first_of_core(int cpu, const cpu_set_t *mask, size_t mask_bytes)
{
    char path[128], line[1024];
    snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", cpu);
    if (!read_line(path, line, sizeof line))
        return true;
    int first, last, read;
    for (const char *at = line; sscanf(at, "%d%n", &first, &read) == 1; at++) { /* "0-1,8-9" */
        at += read;
        last = first;
        if (*at == '-' && sscanf(at, "-%d%n", &last, &read) == 1)
            at += read;
        for (int sibling = first; sibling <= last && sibling < cpu; sibling++) {
            if (CPU_ISSET_S((size_t)sibling, mask_bytes, mask))
                return false;
        }
        if (*at != ',')
            break;
    }
    return true;
}

static void read_from_system(const cpu_boundary *boundary, sebp_topology *topology)
{
    const cpu_set_t *mask = boundary->mask;
    size_t mask_bytes = sizeof boundary->mask;
    for (int cpu = 0; cpu < SEBP_MASK_SETS * CPU_SETSIZE; cpu++) {
        if (!CPU_ISSET_S((size_t)cpu, mask_bytes, mask))
            continue;
        if (topology->logical_cpus++ == 0)
            read_caches(cpu, topology);
        topology->cores += is_first_of_core(cpu, mask, mask_bytes);
    }
}

#else

static double read_cpu_quota(void)
{
    return 0;
}

static void read_from_system(const cpu_boundary *boundary, sebp_topology *topology)
{
    (void)boundary;
    topology->logical_cpus = (int)sysconf(_SC_NPROCESSORS_ONLN);
    topology->cores = topology->logical_cpus;
}

#endif

/* ---- hwloc ---- */

#ifdef SEBP_HAVE_HWLOC

/* Removes the CPUs outside the boundary from a topology. false: none is left. */
static bool restrict_hwloc(hwloc_topology_t hwloc, const cpu_boundary *boundary)
{
#ifdef __linux__
    hwloc_bitmap_t cpus = hwloc_bitmap_alloc();
    bool done = cpus != NULL;
    for (unsigned cpu = 0; cpu < SEBP_MASK_SETS * CPU_SETSIZE && done; cpu++) {
        if (CPU_ISSET_S(cpu, sizeof boundary->mask, boundary->mask))
            done = hwloc_bitmap_set(cpus, cpu) == 0;
    }
    done = done && hwloc_topology_restrict(hwloc, cpus, 0) == 0;
    hwloc_bitmap_free(cpus);
    return done;
#else
    (void)hwloc, (void)boundary;
    return true;
#endif
}

/* The machine within the boundary; NULL: hwloc failed. */
static hwloc_topology_t load_hwloc(const cpu_boundary *boundary)
{
    unsigned long flags =
        HWLOC_TOPOLOGY_FLAG_IS_THISSYSTEM | HWLOC_TOPOLOGY_FLAG_DONT_CHANGE_BINDING;
#ifdef __linux__
    /* Without these files hwloc finds nothing, and says so on standard error. */
    if (access("/sys/devices/system/cpu/cpu0/topology", F_OK) != 0)
        return NULL;
#else
    flags |= HWLOC_TOPOLOGY_FLAG_RESTRICT_TO_CPUBINDING;
#endif
    hwloc_topology_t hwloc;
    if (hwloc_topology_init(&hwloc) != 0)
        return NULL;
    if (hwloc_topology_set_flags(hwloc, flags) != 0 || hwloc_topology_load(hwloc) != 0 ||
        !restrict_hwloc(hwloc, boundary)) {
        hwloc_topology_destroy(hwloc);
        return NULL;
    }
    return hwloc;
}

static size_t cache_bytes(hwloc_topology_t hwloc, hwloc_obj_type_t type)
{
    hwloc_obj_t cache = hwloc_get_obj_by_type(hwloc, type, 0);
    return cache != NULL ? (size_t)cache->attr->cache.size : 0;
}

static bool read_from_hwloc(const cpu_boundary *boundary, sebp_topology *topology)
{
    snprintf(topology->hwloc, sizeof topology->hwloc, "unknown");
    hwloc_topology_t hwloc = load_hwloc(boundary);
    if (hwloc == NULL)
        return false;
    topology->logical_cpus = hwloc_get_nbobjs_by_type(hwloc, HWLOC_OBJ_PU);
    topology->cores = hwloc_get_nbobjs_by_type(hwloc, HWLOC_OBJ_CORE);
    topology->numa_nodes = hwloc_get_nbobjs_by_type(hwloc, HWLOC_OBJ_NUMANODE);
    topology->core_kinds = hwloc_cpukinds_get_nr(hwloc, 0);
    topology->l2_bytes = cache_bytes(hwloc, HWLOC_OBJ_L2CACHE);
    topology->l3_bytes = cache_bytes(hwloc, HWLOC_OBJ_L3CACHE);
    const char *version = hwloc_obj_get_info_by_name(hwloc_get_root_obj(hwloc), "hwlocVersion");
    if (version != NULL)
        snprintf(topology->hwloc, sizeof topology->hwloc, "%s", version);
    hwloc_topology_destroy(hwloc);
    return true;
}

/* A logical CPU and what decides its turn. */
typedef struct seat {
    int cpu;
    int sibling; /* 0 for the first logical CPU of a core, 1 for the second, ... */
    int node;
    int speed; /* of its kind of core: the faster the higher */
    int order; /* as the machine lists them; within a node once compared by it */
} seat;

/* Physical cores first, node by node, there the faster first. */
static int compare_compact(const void *one, const void *other)
{
    const seat *a = one, *b = other;
    if (a->sibling != b->sibling)
        return a->sibling - b->sibling;
    if (a->node != b->node)
        return a->node - b->node;
    return a->speed != b->speed ? b->speed - a->speed : a->order - b->order;
}

/* Physical cores first, the first of each node, the second of each, ... */
static int compare_spread(const void *one, const void *other)
{
    const seat *a = one, *b = other;
    if (a->sibling != b->sibling)
        return a->sibling - b->sibling;
    return a->order != b->order ? a->order - b->order : a->node - b->node;
}

static void list_seats(hwloc_topology_t hwloc, seat *seats, int count)
{
    hwloc_obj_t core_before = NULL;
    int sibling = 0;
    for (int i = 0; i < count; i++) {
        hwloc_obj_t pu = hwloc_get_obj_by_type(hwloc, HWLOC_OBJ_PU, (unsigned)i);
        hwloc_obj_t core = hwloc_get_ancestor_obj_by_type(hwloc, HWLOC_OBJ_CORE, pu);
        sibling = core != NULL && core == core_before ? sibling + 1 : 0;
        core_before = core;
        int speed = -1, kind = hwloc_cpukinds_get_by_cpuset(hwloc, pu->cpuset, 0);
        if (kind >= 0)
            hwloc_cpukinds_get_info(hwloc, (unsigned)kind, NULL, &speed, NULL, NULL, 0);
        seats[i] = (seat){.cpu = (int)pu->os_index,
                          .sibling = sibling,
                          .node = hwloc_bitmap_first(pu->nodeset),
                          .speed = speed,
                          .order = i};
    }
}

static void sort_seats(sebp_placement placement, seat *seats, int count)
{
    qsort(seats, (size_t)count, sizeof *seats, compare_compact);
    if (placement == SEBP_PLACEMENT_COMPACT)
        return;
    for (int i = 0, order = 0; i < count; i++) {
        bool same =
            i > 0 && seats[i].sibling == seats[i - 1].sibling && seats[i].node == seats[i - 1].node;
        order = same ? order + 1 : 0;
        seats[i].order = order;
    }
    qsort(seats, (size_t)count, sizeof *seats, compare_spread);
}

bool sebp_topology_can_place(void)
{
#ifdef __linux__
    return true;
#else
    return false;
#endif
}

sebp_status sebp_topology_place(sebp_placement placement, int threads, int *cpus)
{
    cpu_boundary boundary;
    read_boundary(&boundary);
    hwloc_topology_t hwloc = load_hwloc(&boundary);
    if (hwloc == NULL)
        return SEBP_ERROR_BACKEND;
    sebp_status status = SEBP_ERROR_MEMORY;
    int count = hwloc_get_nbobjs_by_type(hwloc, HWLOC_OBJ_PU);
    seat *seats = count > 0 ? calloc((size_t)count, sizeof *seats) : NULL;
    if (seats != NULL) {
        list_seats(hwloc, seats, count);
        sort_seats(placement, seats, count);
        for (int i = 0; i < threads; i++)
            cpus[i] = seats[i % count].cpu;
        status = SEBP_SUCCESS;
    }
    free(seats);
    hwloc_topology_destroy(hwloc);
    return status;
}

#else

static bool read_from_hwloc(const cpu_boundary *boundary, sebp_topology *topology)
{
    (void)boundary, (void)topology;
    return false;
}

bool sebp_topology_can_place(void)
{
    return false;
}

sebp_status sebp_topology_place(sebp_placement placement, int threads, int *cpus)
{
    (void)placement, (void)threads, (void)cpus;
    return SEBP_ERROR_UNSUPPORTED;
}

#endif

/* ---- both ---- */

static int at_least_one(int count)
{
    return count > 0 ? count : 1;
}

void sebp_topology_read(sebp_topology *topology)
{
    cpu_boundary boundary;
    read_boundary(&boundary);
    memset(topology, 0, sizeof *topology);
    if (!read_from_hwloc(&boundary, topology))
        read_from_system(&boundary, topology);
    topology->logical_cpus = at_least_one(topology->logical_cpus);
    if (boundary.max > 0 && boundary.max < topology->logical_cpus)
        topology->logical_cpus = boundary.max;
    /* The machine may not tell cores apart. */
    if (topology->cores <= 0 || topology->cores > topology->logical_cpus)
        topology->cores = topology->logical_cpus;
    topology->numa_nodes = at_least_one(topology->numa_nodes);
    topology->core_kinds = at_least_one(topology->core_kinds);
    topology->cpu_quota = read_cpu_quota();
    if (topology->l2_bytes == 0)
        topology->l2_bytes = ASSUMED_L2;
}

int sebp_topology_default_threads(const sebp_topology *topology)
{
    double quota = topology->cpu_quota;
    bool is_tight = quota > 0 && quota < topology->cores;
    return at_least_one(is_tight ? (int)quota : topology->cores);
}
