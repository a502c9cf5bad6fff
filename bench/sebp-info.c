/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sebp-info: what libsebp is, what it was built with, what it found on this machine, and what a
 * context made here and now would do.
 */
#define _POSIX_C_SOURCE 200809L

#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <sebp/sebp.h>

static const char usage[] = "Usage: sebp-info [OPTION]\n"
                            "Tell what libsebp finds on this machine.\n"
                            "\n"
                            "      --isa      the tiers of kernels this machine runs, one a line\n"
                            "      --python   what the Python package finds (python3 -m sebp)\n"
                            "      --help, --version\n";

/* Empty where the CPU does not tell its name. */
static void read_cpu_name(char *name, size_t room)
{
    char line[512];
    FILE *file = fopen("/proc/cpuinfo", "r");
    name[0] = '\0';
    while (file != NULL && name[0] == '\0' && fgets(line, sizeof line, file) != NULL) {
        const char *colon = strchr(line, ':');
        if (strncmp(line, "model name", 10) == 0 && colon != NULL)
            snprintf(name, room, "%.*s", (int)strcspn(colon + 2, "\n"), colon + 2);
    }
    if (file != NULL)
        fclose(file);
}

/* The OpenMP and oneDNN libraries mapped into this process: more than one OpenMP runtime is the
 * usual cause of threads that fight over cores. */
static void print_loaded(void)
{
    static const char *const names[] = {"libgomp", "libomp", "libiomp", "libdnnl", "libmkl"};
    char line[4096], last[4096] = "";
    int count = 0;
    FILE *maps = fopen("/proc/self/maps", "r");
    if (maps == NULL) {
        puts("loaded         not known: there is no /proc/self/maps");
        return;
    }
    while (fgets(line, sizeof line, maps) != NULL) {
        line[strcspn(line, "\n")] = '\0';
        const char *path = strchr(line, '/');
        const char *name = path == NULL ? NULL : strrchr(path, '/') + 1;
        if (name == NULL || strcmp(path, last) == 0)
            continue;
        strcpy(last, path); /* a library is mapped in several pieces, one after the other */
        for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
            if (strncmp(name, names[i], strlen(names[i])) == 0)
                printf("%-14s %s\n", count++ == 0 ? "loaded" : "", path);
        }
    }
    fclose(maps);
    if (count == 0)
        puts("loaded         neither an OpenMP runtime nor oneDNN");
}

static void print_environment(void)
{
    static const char *const names[] = {"SEBP_NUM_THREADS",  "SEBP_PLACEMENT", "SEBP_GEMM",
                                        "SEBP_MAX_ISA",      "SEBP_VERBOSE",   "OMP_NUM_THREADS",
                                        "OMP_THREAD_LIMIT",  "OMP_PROC_BIND",  "OMP_PLACES",
                                        "GOMP_CPU_AFFINITY", "KMP_AFFINITY"};
    int count = 0;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        if (getenv(names[i]) != NULL)
            printf("%-14s %s=%s\n", count++ == 0 ? "environment" : "", names[i], getenv(names[i]));
    }
    if (count == 0)
        puts("environment    nothing that libsebp reads is set");
}

static void print_machine(const sebp_info *info)
{
    char cpu[256];
    read_cpu_name(cpu, sizeof cpu);
    printf("libsebp        %s\n", sebp_version());
    printf("oneDNN         %s\n", info->onednn[0] != '\0' ? info->onednn : "built without");
    printf("hwloc          %s\n", info->hwloc[0] != '\0' ? info->hwloc : "built without");
    if (info->openmp > 0)
        printf("OpenMP         %d\n", info->openmp);
    else
        puts("OpenMP         built without");
    printf("CUDA           %s\n", info->cuda[0] != '\0' ? info->cuda : "built without");
    printf("CPU            %s\n", cpu[0] != '\0' ? cpu : "unknown");
    printf("cores          %d physical, %d logical, %d NUMA node%s, %d kind%s\n", info->cores,
           info->logical_cpus, info->numa_nodes, info->numa_nodes == 1 ? "" : "s", info->core_kinds,
           info->core_kinds == 1 ? "" : "s");
    if (info->cpu_quota > 0)
        printf("CPU quota      %g\n", info->cpu_quota);
    else
        puts("CPU quota      none");
    printf("caches         L2 %zu KiB a core, L3 %zu KiB\n", info->l2_bytes >> 10,
           info->l3_bytes >> 10);
    printf("kernels        %s; this machine runs", sebp_isa());
    for (int i = 0; i < sebp_isa_count(); i++)
        printf(" %s", sebp_isa_name(i));
    putchar('\n');
    if (info->amx_refused != NULL)
        printf("               not amx, which this CPU has: %s\n", info->amx_refused);
}

static void print_context(const sebp_context *context, const sebp_info *info)
{
    static const char *const placements[] = {"none", "compact", "spread"};
    static const char *const gemms[] = {"auto", "native", "onednn"};
    printf("context        %d thread%s, placement %s, gemm %s\n", sebp_context_threads(context),
           sebp_context_threads(context) == 1 ? "" : "s", placements[info->placement],
           gemms[info->gemm]);
    if (info->placement_refused != NULL)
        printf("               threads are not bound: %s is set\n", info->placement_refused);
}

/* The GPU that a context would work on, in a build with CUDA. */
static void print_gpu(void)
{
    char message[256] = "";
    sebp_info info = {.size_bytes = sizeof info};
    sebp_context_options options = SEBP_CONTEXT_OPTIONS_INIT;
    sebp_context *context = NULL;
    options.device = SEBP_DEVICE_CUDA;
    options.message = message;
    options.message_bytes = sizeof message;
    if (sebp_context_create(&options, &context) != SEBP_SUCCESS)
        printf("GPU            none: %s\n", message);
    else if (sebp_info_get(context, &info) == SEBP_SUCCESS)
        printf("GPU            %s\n", info.gpu);
    sebp_context_destroy(context);
}

/* 0, or 1 where this environment allows no context. */
static int print_all(void)
{
    char message[256] = "";
    sebp_info info = {.size_bytes = sizeof info};
    sebp_context_options options = SEBP_CONTEXT_OPTIONS_INIT;
    sebp_context *context = NULL;
    options.message = message;
    options.message_bytes = sizeof message;
    sebp_status made = sebp_context_create(&options, &context);
    sebp_status status = sebp_info_get(context, &info);
    if (status != SEBP_SUCCESS) {
        fprintf(stderr, "sebp-info: %s\n", sebp_status_string(status));
        sebp_context_destroy(context);
        return 1;
    }
    print_machine(&info);
    if (info.cuda[0] != '\0')
        print_gpu();
    if (made == SEBP_SUCCESS) {
        print_context(context, &info);
    } else {
        printf("context        refused: %s\n",
               message[0] != '\0' ? message : sebp_status_string(made));
    }
    print_environment();
    print_loaded();
    sebp_context_destroy(context);
    return made == SEBP_SUCCESS ? 0 : 1;
}

/* Becomes "python3 -m sebp", with a word on what to do where there is no such module. Returns only
 * where it cannot. */
static int run_python(void)
{
    static const char program[] =
        "import sys\n"
        "try:\n"
        "    from sebp.__main__ import main\n"
        "except ImportError as error:\n"
        "    sys.exit('sebp-info: %s: %s; \"pip install ./python\" in the sources of libsebp '\n"
        "             'installs the package' % (sys.executable, error))\n"
        "sys.exit(main())\n";
    const char *python = getenv("PYTHON");
    if (python == NULL || python[0] == '\0')
        python = "python3";
    execlp(python, python, "-c", program, (char *)NULL);
    fprintf(stderr, "sebp-info: cannot run '%s' (PYTHON names the interpreter): ", python);
    perror(NULL);
    return 1;
}

int main(int argc, char **argv)
{
    int isa = 0, python = 0, help = 0, version = 0, status = 0, result;
    const struct option known[] = {
        {"isa", no_argument, &isa, 1},
        {"python", no_argument, &python, 1},
        {"help", no_argument, &help, 1},
        {"version", no_argument, &version, 1},
        {NULL, 0, NULL, 0},
    };
    opterr = 0;
    while ((result = getopt_long(argc, argv, "", known, NULL)) == 0)
        continue;
    if (result != -1 || optind < argc) {
        fprintf(stderr, "sebp-info: '%s' is not an option; try --help\n",
                argv[result != -1 ? optind - 1 : optind]);
        return 2;
    }
    if (help) {
        fputs(usage, stdout);
    } else if (version) {
        printf("sebp-info %s\n", sebp_version());
    } else if (isa) {
        for (int i = 0; i < sebp_isa_count(); i++)
            puts(sebp_isa_name(i));
    } else if (python) {
        status = run_python();
    } else {
        status = print_all();
    }
    if (fflush(stdout) != 0) {
        perror("sebp-info: cannot write");
        return 1;
    }
    return status;
}
