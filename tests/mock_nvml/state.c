/* The state file of the mock and the way into every call; see state.h. */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "state.h"

pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
struct scope host;
struct gpu gpus[MAX_GPUS];
int n_gpus;
static char seen_path[4096];
static struct stat seen;
static int state_ok;

int references, in_flight;
unsigned epoch;
char slots[MAX_GPUS][96];
int n_slots;
static struct { const char *fn; unsigned long n; } counters[96];

void copy(char *to, const char *from, size_t size)
{
    size_t length = from ? strnlen(from, size - 1) : 0;
    if (length) memcpy(to, from, length);
    to[length] = 0;
}

static void parse_rule(struct scope *s, char *rest)
{
    if (s->n_rules == MAX_RULES) return;
    struct rule *r = &s->rules[s->n_rules++];
    memset(r, 0, sizeof *r);
    char what[16] = "";
    int number = 0;
    sscanf(rest, "%63s %15s %d", r->fn, what, &number);
    if (!strcmp(what, "error")) r->error = number;
    else if (!strcmp(what, "sleep")) r->sleep_ms = number;
    else if (!strcmp(what, "hang")) r->hang = 1;
}

static void parse_line(char *line)
{
    char *rest = strchr(line, ' ');
    if (!rest) return;
    *rest++ = 0;
    if (!strcmp(line, "gpu")) {
        if (n_gpus == MAX_GPUS) return;
        struct gpu *g = &gpus[n_gpus++];
        memset(g, 0, sizeof *g);
        copy(g->uuid, rest, sizeof g->uuid);
        return;
    }
    struct gpu *g = n_gpus ? &gpus[n_gpus - 1] : NULL;
    struct scope *s = g ? &g->scope : &host;
    if (!strcmp(line, "rule")) {
        parse_rule(s, rest);
    } else if (!strcmp(line, "set") && s->n_keys < MAX_KEYS) {
        struct key *k = &s->keys[s->n_keys++];
        char *value = strchr(rest, ' ');
        if (value) *value++ = 0;
        copy(k->name, rest, sizeof k->name);
        copy(k->value, value, sizeof k->value);
    } else if (!g) {
        return;
    } else if (!strcmp(line, "proc") && g->n_procs < MAX_PROCS) {
        struct proc *p = &g->procs[g->n_procs++];
        char used[32] = "-";
        p->mig = -1;
        sscanf(rest, "%c %u %31s %d", &p->kind, &p->pid, used, &p->mig);
        p->used = used[0] == '-' ? ~0ULL : strtoull(used, NULL, 10);
    } else if (!strcmp(line, "event") && g->n_events < MAX_EVENTS) {
        struct event *e = &g->events[g->n_events++];
        sscanf(rest, "%llu %llu %llu", &e->seq, &e->type, &e->data);
    } else if (!strcmp(line, "field") && g->n_fields < 16) {
        struct field *f = &g->fields[g->n_fields++];
        sscanf(rest, "%u %llu", &f->id, &f->value);
    } else if (!strcmp(line, "mig") && g->n_migs < MAX_MIG) {
        struct mig *m = &g->migs[g->n_migs++];
        sscanf(rest, "%95s %llu %llu %31s", m->uuid, &m->total, &m->used, m->profile);
    }
}

void refresh(void)
{
    const char *path = getenv("MOCK_NVML_STATE");
    struct stat now;
    if (!path || stat(path, &now)) {
        if (state_ok || !seen_path[0])
            fprintf(stderr, "mock NVML: cannot read MOCK_NVML_STATE=%s\n", path ? path : "(unset)");
        copy(seen_path, path ? path : "-", sizeof seen_path);
        state_ok = 0;
        return;
    }
    if (state_ok && !strcmp(path, seen_path) && now.st_ino == seen.st_ino && now.st_size == seen.st_size
        && now.st_mtim.tv_sec == seen.st_mtim.tv_sec && now.st_mtim.tv_nsec == seen.st_mtim.tv_nsec)
        return;
    FILE *f = fopen(path, "re");
    if (!f) return;
    memset(&host, 0, sizeof host);
    n_gpus = 0;
    char *line = NULL;
    size_t size = 0;
    ssize_t length;
    while ((length = getline(&line, &size, f)) > 0) {
        if (line[length - 1] == '\n') line[length - 1] = 0;
        parse_line(line);
    }
    free(line);
    fclose(f);
    copy(seen_path, path, sizeof seen_path);
    seen = now;
    state_ok = 1;
}

void nap(int ms)
{
    struct timespec t = { ms / 1000, (ms % 1000) * 1000000L };
    while (nanosleep(&t, &t) && errno == EINTR) {}
}

struct gpu *by_uuid(const char *uuid)
{
    for (int i = 0; i < n_gpus; i++)
        if (!strcmp(gpus[i].uuid, uuid)) return &gpus[i];
    return NULL;
}

const char *text(const struct scope *s, const char *name)
{
    for (int i = 0; i < s->n_keys; i++)
        if (!strcmp(s->keys[i].name, name)) return s->keys[i].value;
    return NULL;
}

int numbers(const struct scope *s, const char *name, int n, u64 *out)
{
    const char *value = text(s, name);
    if (!value) return NOT_SUPPORTED;
    char *end = (char *)value;
    for (int i = 0; i < n; i++) out[i] = strtoull(end, &end, 10);
    return OK;
}

static int rules_say(const struct scope *s, const char *fn, int *sleep_ms, int *hang)
{
    for (int i = 0; i < s->n_rules; i++) {
        const struct rule *r = &s->rules[i];
        if (strcmp(r->fn, fn) && strcmp(r->fn, "*")) continue;
        *sleep_ms += r->sleep_ms;
        *hang |= r->hang;
        if (r->error) return r->error;
    }
    return OK;
}

device_t handle_of(int slot, int mig)
{
    return (device_t)(uintptr_t)(0x4d00000000ULL | (uintptr_t)(epoch & 0xffff) << 16
                                 | (uintptr_t)(mig + 1) << 8 | (uintptr_t)(slot + 1));
}
int slot_of(device_t h) { return (int)((uintptr_t)h & 0xff) - 1; }
int mig_of(device_t h) { return (int)((uintptr_t)h >> 8 & 0xff) - 1; }
static int stale(device_t h)
{
    int slot = slot_of(h);
    return slot < 0 || slot >= n_slots || ((uintptr_t)h >> 16 & 0xffff) != (epoch & 0xffff);
}

int enter(const char *fn, int slot, struct gpu **g)
{
    pthread_mutex_lock(&lock);
    in_flight++;
    for (int i = 0; i < 96; i++) {
        if (counters[i].fn && strcmp(counters[i].fn, fn)) continue;
        counters[i].fn = fn;
        counters[i].n++;
        break;
    }
    for (int slept = 0;; slept = 1) {
        refresh();
        struct gpu *now = slot >= 0 ? by_uuid(slots[slot]) : NULL;
        int sleep_ms = 0, hang = 0;
        int error = rules_say(&host, fn, &sleep_ms, &hang);
        if (now && !error) error = rules_say(&now->scope, fn, &sleep_ms, &hang);
        if (hang || (sleep_ms && !slept)) {
            pthread_mutex_unlock(&lock);
            nap(hang ? 2 : sleep_ms);
            pthread_mutex_lock(&lock);
            continue;
        }
        if (!state_ok) return DRIVER_NOT_LOADED;
        if (error) return error;
        if (strcmp(fn, "nvmlInitWithFlags") && !references) return UNINITIALIZED;
        if (slot >= 0 && !now) return GPU_IS_LOST;
        if (g) *g = now;
        return OK;
    }
}

int enter_device(const char *fn, device_t h, struct gpu **g)
{
    pthread_mutex_lock(&lock);
    int bad = references && stale(h);
    pthread_mutex_unlock(&lock);
    int rc = enter(fn, bad || !references ? -1 : slot_of(h), g);
    if (!rc && !bad) bad = mig_of(h) >= (*g)->n_migs; /* a slice that is gone */
    return rc ? rc : bad ? INVALID_ARGUMENT : OK;
}

int done(int rc)
{
    in_flight--;
    pthread_mutex_unlock(&lock);
    return rc;
}

/* For tests in the same process: how often a function was called. */
API unsigned long mock_nvml_calls(const char *fn)
{
    unsigned long n = 0;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < 96 && counters[i].fn; i++)
        if (!strcmp(counters[i].fn, fn)) n = counters[i].n;
    pthread_mutex_unlock(&lock);
    return n;
}
