/* The functions of NVML that nvidia-ml-py looks up; see state.h. */
#define _GNU_SOURCE
#include <strings.h>
#include <time.h>
#include <unistd.h>

#include "state.h"

static struct { char uuid[96]; unsigned mode; } compute_modes[MAX_GPUS]; /* what SetComputeMode set */
static int n_compute_modes;

/* --- library ------------------------------------------------------------------------------- */

API int nvmlInitWithFlags(unsigned flags)
{
    (void)flags;
    int rc = enter(__func__, -1, NULL);
    if (rc == OK && references++ == 0) {
        epoch++;
        n_slots = n_gpus;
        for (int i = 0; i < n_gpus; i++) copy(slots[i], gpus[i].uuid, sizeof slots[i]);
    }
    return done(rc);
}

API int nvmlShutdown(void)
{
    pthread_mutex_lock(&lock);
    if (!references) {
        pthread_mutex_unlock(&lock);
        return UNINITIALIZED;
    }
    if (references == 1 && in_flight) {
        fprintf(stderr, "mock NVML: nvmlShutdown while %d calls run: the real library crashes here\n",
                in_flight);
        abort();
    }
    references--;
    pthread_mutex_unlock(&lock);
    return OK;
}

API const char *nvmlErrorString(int code)
{
    switch (code) {
    case OK: return "Success";
    case UNINITIALIZED: return "Uninitialized";
    case INVALID_ARGUMENT: return "Invalid Argument";
    case NOT_SUPPORTED: return "Not Supported";
    case NOT_FOUND: return "Not Found";
    case GPU_IS_LOST: return "GPU is lost";
    case 28: return "GPU not found";
    default: return "Unknown Error";
    }
}

static int host_text(const char *name, char *out, unsigned size)
{
    const char *value = text(&host, name);
    if (value) copy(out, value, size);
    return done(value ? OK : NOT_SUPPORTED);
}

API int nvmlSystemGetDriverVersion(char *out, unsigned size) { HOST(); return host_text("driver_version", out, size); }
API int nvmlSystemGetNVMLVersion(char *out, unsigned size) { HOST(); return host_text("nvml_version", out, size); }

API int nvmlSystemGetCudaDriverVersion(int *out)
{
    HOST();
    u64 v;
    int rc = numbers(&host, "cuda_version", 1, &v);
    if (!rc) *out = (int)v;
    return done(rc);
}

API int nvmlSystemGetProcessName(unsigned pid, char *out, unsigned size)
{
    HOST();
    char path[64], exe[1024];
    snprintf(path, sizeof path, "/proc/%u/exe", pid);
    ssize_t n = readlink(path, exe, sizeof exe - 1);
    if (n < 0) return done(NOT_FOUND);
    exe[n] = 0;
    copy(out, exe, size);
    return done(OK);
}

/* --- handles and identity ------------------------------------------------------------------ */

API int nvmlDeviceGetCount_v2(unsigned *out)
{
    HOST();
    *out = (unsigned)n_slots;
    return done(OK);
}

static int open_slot(const char *fn, int slot, device_t *out)
{
    struct gpu *g = NULL;
    int rc = enter(fn, slot, &g);
    u64 error = 0;
    if (!rc && g && !numbers(&g->scope, "open_error", 1, &error) && error) rc = (int)error;
    if (!rc) *out = handle_of(slot, -1);
    return done(rc);
}

API int nvmlDeviceGetHandleByIndex_v2(unsigned index, device_t *out)
{
    if (index < (unsigned)n_slots) return open_slot(__func__, (int)index, out);
    HOST();
    return done(INVALID_ARGUMENT);
}

static int find_slot(const char *key, const char *wanted)
{
    int found = -1;
    pthread_mutex_lock(&lock);
    refresh();
    for (int i = 0; i < n_slots && found < 0; i++) {
        struct gpu *g = by_uuid(slots[i]);
        const char *value = !key ? slots[i] : g ? text(&g->scope, key) : NULL;
        if (value && !strcasecmp(value, wanted)) found = i;
    }
    pthread_mutex_unlock(&lock);
    return found;
}

API int nvmlDeviceGetHandleByUUID(const char *uuid, device_t *out)
{
    int slot = find_slot(NULL, uuid);
    if (slot >= 0) return open_slot(__func__, slot, out);
    HOST();
    return done(NOT_FOUND);
}

API int nvmlDeviceGetHandleByPciBusId_v2(const char *bus_id, device_t *out)
{
    int slot = find_slot("pci_bus_id", bus_id);
    if (slot >= 0) return open_slot(__func__, slot, out);
    HOST();
    return done(NOT_FOUND);
}

static struct mig *mig_device(struct gpu *g, device_t h)
{
    return mig_of(h) < 0 ? NULL : &g->migs[mig_of(h)];
}

API int nvmlDeviceGetUUID(device_t h, char *out, unsigned size)
{
    DEVICE(h);
    struct mig *m = mig_device(g, h);
    copy(out, m ? m->uuid : g->uuid, size);
    return done(OK);
}

API int nvmlDeviceGetName(device_t h, char *out, unsigned size)
{
    DEVICE(h);
    struct mig *m = mig_device(g, h);
    const char *value = text(&g->scope, "name");
    if (value) snprintf(out, size, m ? "%s MIG %s" : "%s", value, m ? m->profile : "");
    return done(value ? OK : NOT_SUPPORTED);
}

struct pci { char legacy[16]; unsigned domain, bus, device, id, subsystem; char bus_id[32]; };
_Static_assert(sizeof(struct pci) == 68, "nvml.h");

API int nvmlDeviceGetPciInfo_v3(device_t h, struct pci *out)
{
    DEVICE(h);
    const char *value = text(&g->scope, "pci_bus_id");
    if (!value) return done(NOT_SUPPORTED);
    memset(out, 0, sizeof *out);
    copy(out->bus_id, value, sizeof out->bus_id);
    sscanf(value, "%x:%x:%x", &out->domain, &out->bus, &out->device);
    copy(out->legacy, strlen(value) > 4 ? value + 4 : value, sizeof out->legacy);
    return done(OK);
}

/* --- one number each ----------------------------------------------------------------------- */

#define METRIC(function, name, type) \
    API int function(device_t h, type *out) \
    { \
        WHOLE(h); \
        u64 v = 0; \
        int rc = numbers(&g->scope, name, 1, &v); \
        if (!rc) *out = (type)v; \
        return done(rc); \
    }
#define PAIR(function, name) \
    API int function(device_t h, unsigned *a, unsigned *b) \
    { \
        WHOLE(h); \
        u64 v[2] = { 0 }; \
        int rc = numbers(&g->scope, name, 2, v); \
        if (!rc) { *a = (unsigned)v[0]; *b = (unsigned)v[1]; } \
        return done(rc); \
    }
METRIC(nvmlDeviceGetMinorNumber, "minor", unsigned)
METRIC(nvmlDeviceGetPowerUsage, "power", unsigned)
METRIC(nvmlDeviceGetEnforcedPowerLimit, "power_limit", unsigned)
METRIC(nvmlDeviceGetTotalEnergyConsumption, "energy", u64)
METRIC(nvmlDeviceGetCurrentClocksEventReasons, "clocks_event_reasons", u64)
METRIC(nvmlDeviceGetCurrentClocksThrottleReasons, "clocks_event_reasons", u64)
METRIC(nvmlDeviceGetPersistenceMode, "persistence_mode", unsigned)
METRIC(nvmlDeviceGetMaxMigDeviceCount, "max_mig_devices", unsigned)
METRIC(nvmlDeviceGetSupportedEventTypes, "supported_events", u64)
PAIR(nvmlDeviceGetEccMode, "ecc_mode")
PAIR(nvmlDeviceGetMigMode, "mig_mode")

/* Up to 64 of each: the first word of the set. */
static int affinity(const struct gpu *g, const char *key, unsigned size, u64 *set)
{
    if (!size)
        return done(INSUFFICIENT_SIZE);
    memset(set, 0, size * sizeof *set);
    return done(numbers(&g->scope, key, 1, set));
}
API int nvmlDeviceGetCpuAffinityWithinScope(device_t h, unsigned size, u64 *set, unsigned scope)
{
    DEVICE(h);
    (void)scope;
    return affinity(g, "cpus", size, set);
}
API int nvmlDeviceGetMemoryAffinity(device_t h, unsigned size, u64 *set, unsigned scope)
{
    DEVICE(h);
    (void)scope;
    return affinity(g, "nodes", size, set);
}

struct utilization { unsigned gpu, memory; };
_Static_assert(sizeof(struct utilization) == 8, "nvml.h");
API int nvmlDeviceGetUtilizationRates(device_t h, struct utilization *out)
{
    WHOLE(h);
    u64 v[2];
    int rc = numbers(&g->scope, "utilization", 2, v);
    if (!rc) *out = (struct utilization){ (unsigned)v[0], (unsigned)v[1] };
    return done(rc);
}

struct temperature { unsigned version, sensor; int celsius; };
_Static_assert(sizeof(struct temperature) == 12, "nvml.h");
API int nvmlDeviceGetTemperatureV(device_t h, struct temperature *io)
{
    WHOLE(h);
    if (io->version != 0x100000c) return done(ARGUMENT_VERSION_MISMATCH);
    u64 v;
    int rc = numbers(&g->scope, "temperature", 1, &v);
    if (!rc) io->celsius = (int)v;
    return done(rc);
}

API int nvmlDeviceGetTemperature(device_t h, unsigned sensor, unsigned *out)
{
    WHOLE(h);
    u64 v;
    int rc = sensor ? INVALID_ARGUMENT : numbers(&g->scope, "temperature", 1, &v);
    if (!rc) *out = (unsigned)v;
    return done(rc);
}

API int nvmlDeviceGetClockInfo(device_t h, unsigned type, unsigned *out)
{
    WHOLE(h);
    u64 v[4];
    int rc = type > 3 ? INVALID_ARGUMENT : numbers(&g->scope, "clocks", 4, v);
    if (!rc) *out = (unsigned)v[type];
    return done(rc);
}

API int nvmlDeviceGetTotalEccErrors(device_t h, unsigned error, unsigned counter, u64 *out)
{
    (void)counter;
    WHOLE(h);
    u64 v[2];
    int rc = error > 1 ? INVALID_ARGUMENT : numbers(&g->scope, "ecc_errors", 2, v);
    if (!rc) *out = v[error];
    return done(rc);
}

API int nvmlDeviceGetRemappedRows(device_t h, unsigned *a, unsigned *b, unsigned *c, unsigned *d)
{
    WHOLE(h);
    u64 v[4];
    int rc = numbers(&g->scope, "remapped_rows", 4, v);
    if (!rc) { *a = (unsigned)v[0]; *b = (unsigned)v[1]; *c = (unsigned)v[2]; *d = (unsigned)v[3]; }
    return done(rc);
}

API int nvmlDeviceGetComputeMode(device_t h, unsigned *out)
{
    WHOLE(h);
    u64 v;
    int rc = numbers(&g->scope, "compute_mode", 1, &v);
    if (!rc) *out = (unsigned)v;
    for (int i = 0; !rc && i < n_compute_modes; i++)
        if (!strcmp(compute_modes[i].uuid, g->uuid)) *out = compute_modes[i].mode;
    return done(rc);
}

API int nvmlDeviceSetComputeMode(device_t h, unsigned mode)
{
    WHOLE(h);
    if (mode > 3) return done(INVALID_ARGUMENT);
    if (!text(&g->scope, "compute_mode")) return done(NOT_SUPPORTED);
    int i = 0;
    while (i < n_compute_modes && strcmp(compute_modes[i].uuid, g->uuid)) i++;
    if (i == MAX_GPUS) return done(NOT_SUPPORTED);
    if (i == n_compute_modes) n_compute_modes++;
    copy(compute_modes[i].uuid, g->uuid, sizeof compute_modes[i].uuid);
    compute_modes[i].mode = mode;
    return done(OK);
}

/* --- memory, fields, MIG ------------------------------------------------------------------- */

struct memory { u64 total, free, used; };
_Static_assert(sizeof(struct memory) == 24, "nvml.h");
struct memory_v2 { unsigned version; u64 total, reserved, free, used; };
_Static_assert(sizeof(struct memory_v2) == 40, "nvml.h");

static int memory_of(struct gpu *g, device_t h, struct memory_v2 *out)
{
    struct mig *m = mig_device(g, h);
    u64 v[3] = { 0 };
    int rc = m ? OK : numbers(&g->scope, "memory", 3, v);
    if (m) { v[0] = m->total; v[2] = m->used; }
    out->total = v[0];
    out->reserved = v[1];
    out->used = v[2];
    out->free = v[0] - v[1] - v[2];
    return rc;
}

API int nvmlDeviceGetMemoryInfo(device_t h, struct memory *out)
{
    DEVICE(h);
    struct memory_v2 m;
    int rc = memory_of(g, h, &m);
    if (!rc) *out = (struct memory){ m.total, m.free, m.used + m.reserved };
    return done(rc);
}

API int nvmlDeviceGetMemoryInfo_v2(device_t h, struct memory_v2 *out)
{
    DEVICE(h);
    if (out->version != 0x2000028) return done(ARGUMENT_VERSION_MISMATCH);
    return done(memory_of(g, h, out));
}

struct field_value { uint32_t id, scope; int64_t time, latency; unsigned type, rc; u64 value; };
_Static_assert(sizeof(struct field_value) == 40, "nvml.h");
API int nvmlDeviceGetFieldValues(device_t h, int n, struct field_value *out)
{
    WHOLE(h);
    for (int i = 0; i < n; i++) {
        out[i].rc = NOT_SUPPORTED;
        for (int k = 0; k < g->n_fields; k++) {
            if (g->fields[k].id != out[i].id) continue;
            out[i].type = g->fields[k].value >> 32 ? 3 : 1; /* unsigned long long, unsigned int */
            out[i].value = g->fields[k].value;
            out[i].rc = OK;
        }
    }
    return done(OK);
}

API int nvmlDeviceGetMigDeviceHandleByIndex(device_t h, unsigned index, device_t *out)
{
    WHOLE(h);
    if (!text(&g->scope, "mig_mode")) return done(NOT_SUPPORTED);
    if (index >= (unsigned)g->n_migs) return done(NOT_FOUND);
    *out = handle_of(slot_of(h), (int)index);
    return done(OK);
}

/* --- processes ----------------------------------------------------------------------------- */

struct process { unsigned pid; u64 used; unsigned gpu_instance, compute_instance; };
_Static_assert(sizeof(struct process) == 24, "nvml.h");

static int processes(struct gpu *g, device_t h, char kind, unsigned *n, struct process *out)
{
    unsigned found = 0, room = *n;
    for (int i = 0; i < g->n_procs; i++) {
        struct proc *p = &g->procs[i];
        if (p->kind != kind || (mig_of(h) >= 0 && p->mig != mig_of(h))) continue;
        /* The driver counts its GPU instances from 1; each of these has one compute instance. */
        unsigned instance = p->mig < 0 ? ~0U : (unsigned)p->mig + 1;
        if (out && found < room)
            out[found] = (struct process){ p->pid, p->used, instance, p->mig < 0 ? ~0U : 0 };
        found++;
    }
    *n = found;
    return done(found > room ? INSUFFICIENT_SIZE : OK);
}

#define PROCESSES(function, kind) \
    API int function(device_t h, unsigned *n, struct process *out) \
    { \
        DEVICE(h); \
        return processes(g, h, kind, n, out); \
    }
PROCESSES(nvmlDeviceGetComputeRunningProcesses_v2, 'c')
PROCESSES(nvmlDeviceGetComputeRunningProcesses_v3, 'c')
PROCESSES(nvmlDeviceGetGraphicsRunningProcesses_v2, 'g')
PROCESSES(nvmlDeviceGetGraphicsRunningProcesses_v3, 'g')
PROCESSES(nvmlDeviceGetMPSComputeRunningProcesses_v2, 'm')
PROCESSES(nvmlDeviceGetMPSComputeRunningProcesses_v3, 'm')

/* --- events -------------------------------------------------------------------------------- */

struct event_data { device_t device; u64 type, data; unsigned gpu_instance, compute_instance; };
_Static_assert(sizeof(struct event_data) == 32, "nvml.h");

API int nvmlEventSetCreate(struct event_set **out)
{
    HOST();
    *out = calloc(1, sizeof **out);
    return done(*out ? OK : 20);
}

API int nvmlEventSetFree(struct event_set *set)
{
    HOST();
    free(set);
    return done(OK);
}

API int nvmlDeviceRegisterEvents(device_t h, u64 types, struct event_set *set)
{
    DEVICE(h);
    u64 supported = 0;
    int rc = numbers(&g->scope, "supported_events", 1, &supported);
    if (rc || (types & ~supported) || set->n == MAX_GPUS) return done(NOT_SUPPORTED);
    struct registration *r = &set->items[set->n++];
    copy(r->uuid, g->uuid, sizeof r->uuid);
    r->device = h;
    r->types = types;
    r->cursor = 0;
    for (int i = 0; i < g->n_events; i++)
        if (g->events[i].seq > r->cursor) r->cursor = g->events[i].seq;
    return done(OK);
}

static int next_event(struct event_set *set, struct event_data *out)
{
    struct registration *from = NULL;
    struct event *first = NULL;
    for (int i = 0; i < set->n; i++) {
        struct gpu *g = by_uuid(set->items[i].uuid);
        for (int k = 0; g && k < g->n_events; k++) {
            struct event *e = &g->events[k];
            if (e->seq <= set->items[i].cursor || !(e->type & set->items[i].types)) continue;
            if (first && first->seq <= e->seq) continue;
            first = e;
            from = &set->items[i];
        }
    }
    if (!first) return 0;
    from->cursor = first->seq;
    *out = (struct event_data){ from->device, first->type, first->data, ~0U, ~0U };
    return 1;
}

API int nvmlEventSetWait_v2(struct event_set *set, struct event_data *out, unsigned ms)
{
    HOST();
    struct timespec start, now;
    clock_gettime(CLOCK_MONOTONIC, &start);
    while (!next_event(set, out)) {
        clock_gettime(CLOCK_MONOTONIC, &now);
        if ((now.tv_sec - start.tv_sec) * 1000 + (now.tv_nsec - start.tv_nsec) / 1000000 >= (long)ms)
            return done(TIMEOUT);
        pthread_mutex_unlock(&lock);
        nap(2);
        pthread_mutex_lock(&lock);
        refresh();
    }
    return done(OK);
}
