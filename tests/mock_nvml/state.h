#pragma once
/* A stand-in for libnvidia-ml.so.1 that a state file drives while the program under test runs.
 *
 * MOCK_NVML_STATE names the file; it is read again whenever it changes, so write it atomically.
 * One statement a line, words split by single spaces:
 *
 *   set KEY VALUE             driver_version, nvml_version, cuda_version
 *   rule FUNCTION error CODE  the call fails; FUNCTION "*" is every call but ErrorString, Shutdown
 *   rule FUNCTION sleep MS    the call is slow
 *   rule FUNCTION hang        the call blocks until the line is gone
 *   gpu UUID                  starts a GPU; the statements below and `rule`, `set` then belong to it
 *   proc KIND PID BYTES [MIG] KIND c, g or m (compute, graphics, MPS); BYTES "-" is unknown;
 *                             MIG is the number of the MIG device that it is on
 *   field ID VALUE            for GetFieldValues
 *   mig UUID TOTAL USED NAME  a MIG device, NAME as in 1g.5gb
 *   event SEQ TYPE DATA       delivered to event sets that were registered before SEQ appeared
 *
 * Awkwardness kept from the real library: GPUs are enumerated by the first Init and by nothing
 * later; a GPU that goes away answers "lost" on its old handle; handles die with Shutdown; a key
 * that is not set is "not supported"; Shutdown while another call runs kills the process. MIG
 * devices come and go while NVML is open, and have a name, a UUID, memory and processes only; the
 * lists of their GPU have their processes, too.
 * Layouts and codes: nvml.h of NVIDIA's driver packages, as bound by nvidia-ml-py.
 */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define API __attribute__((visibility("default")))

enum {
    OK = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7, DRIVER_NOT_LOADED = 9, TIMEOUT = 10, GPU_IS_LOST = 15,
    ARGUMENT_VERSION_MISMATCH = 25
};
enum { MAX_GPUS = 64, MAX_RULES = 32, MAX_KEYS = 32, MAX_PROCS = 128, MAX_EVENTS = 64, MAX_MIG = 8 };

typedef unsigned long long u64;
typedef void *device_t;

struct rule { char fn[64]; int error, sleep_ms, hang; };
struct key { char name[32], value[128]; };
struct scope { struct rule rules[MAX_RULES]; int n_rules; struct key keys[MAX_KEYS]; int n_keys; };
struct proc { char kind; unsigned pid; u64 used; int mig; };
struct event { u64 seq, type, data; };
struct field { unsigned id; u64 value; };
struct mig { char uuid[96]; u64 total, used; char profile[32]; };
struct gpu {
    char uuid[96];
    struct scope scope;
    struct proc procs[MAX_PROCS]; int n_procs;
    struct event events[MAX_EVENTS]; int n_events;
    struct field fields[16]; int n_fields;
    struct mig migs[MAX_MIG]; int n_migs;
};

struct registration { char uuid[96]; device_t device; u64 types, cursor; };
struct event_set { struct registration items[MAX_GPUS]; int n; };

extern pthread_mutex_t lock; /* guards everything below */
extern struct scope host;
extern struct gpu gpus[MAX_GPUS];
extern int n_gpus;
extern int references, in_flight;
extern unsigned epoch;
extern char slots[MAX_GPUS][96]; /* the GPUs that Init found, by index */
extern int n_slots;

void refresh(void); /* read the state file again if it changed; lock held */
void nap(int ms);
void copy(char *to, const char *from, size_t size);
struct gpu *by_uuid(const char *uuid);
const char *text(const struct scope *s, const char *name);
int numbers(const struct scope *s, const char *name, int n, u64 *out); /* up to four of one key */

/* Handles hold the epoch, the slot and the MIG device, so that a stale one is found out. */
device_t handle_of(int slot, int mig);
int slot_of(device_t h);
int mig_of(device_t h);

/* Every call: count it, sleep, hang or fail as the rules say. Returns with the lock held; `done`
 * releases it and returns its argument. `slot` -1: not about one GPU. */
int enter(const char *fn, int slot, struct gpu **g);
int enter_device(const char *fn, device_t h, struct gpu **g);
int done(int rc);

#define HOST() do { int rc_ = enter(__func__, -1, NULL); if (rc_) return done(rc_); } while (0)
#define DEVICE(h) struct gpu *g = NULL; \
    do { int rc_ = enter_device(__func__, (h), &g); if (rc_) return done(rc_); } while (0)
#define WHOLE(h) DEVICE(h); \
    do { if (mig_of(h) >= 0) return done(NOT_SUPPORTED); } while (0)
