/* Run a t3c artifact from C: open it, set a budget, run, switch between two calls.
 *
 * A session is for one thread at a time. Functions that return a t3c_status leave the text of what was wrong, and the
 * way out, in t3c_error. Pointers that a session gives out live as long as it does, outputs until its next run.
 */
#ifndef T3C_H
#define T3C_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define T3C_API __attribute__((visibility("default")))

/* The exit codes of t3c-run and of the t3c-compile command too. */
typedef enum {
  T3C_OK = 0,
  T3C_BAD_INPUT = 1,  /* wrong number, shape or dtype of inputs; no such profile; not a budget */
  T3C_NO_PROFILE = 3, /* no profile fits the budget */
  T3C_BAD_ARTIFACT = 4 /* missing, damaged, of another schema, or not for this machine */
} t3c_status;

typedef struct t3c_session t3c_session;

/* One profile on the session's target, from least to greatest. */
typedef struct {
  const char *name;
  double size_mb;    /* weights of this profile alone at its own widths, 1e6 bytes */
  double latency_ms; /* 90th percentile of a call where it was measured, else an estimate */
  const char *latency_source;
  double energy_mj;
  double drift_bound; /* conformal bound of the drift in 2-norm; NaN where the target is not certified */
} t3c_profile;

/* An input the model takes. */
typedef struct {
  const char *name;
  const char *dtype; /* as numpy calls it: float32, int64, ... */
  size_t rank;
  const int64_t *shape;      /* -1 where the size is free */
  const char *const *symbol; /* names of free sizes, NULL where the size is fixed; equal names are equal sizes */
} t3c_input;

/* Row-major values. Inputs are only read, and not copied where they begin at a multiple of 64 bytes. */
typedef struct {
  const char *dtype;
  size_t rank;
  const int64_t *shape;
  const void *data;
} t3c_tensor;

/* Upper limits, positive; what is 0 is free. With max_drift (2-norm of logits, as certified) the cheapest profile that
 * meets it is chosen, otherwise the greatest that fits. Measured latencies are taken 1.1 times as large. */
typedef struct {
  double latency_ms;
  double energy_mj;
  double size_mb;
  double max_drift;
} t3c_budget;

/* Schema, sizes and SHA-256 of all files are checked before any code of the artifact is loaded. target is one of the
 * artifact's, or NULL for the first that runs here; the greatest profile is active. TVM runs a thread on every core
 * unless TVM_NUM_THREADS is set: the first call sets it. */
T3C_API t3c_status t3c_open(const char *artifact, const char *target, t3c_session **session);
T3C_API void t3c_close(t3c_session *session); /* may be NULL */

/* What was wrong in this thread's last call that failed. */
T3C_API const char *t3c_error(void);

T3C_API const char *t3c_target(const t3c_session *session);
T3C_API const t3c_input *t3c_inputs(const t3c_session *session, size_t *count);
T3C_API const t3c_profile *t3c_profiles(const t3c_session *session, size_t *count);
T3C_API const t3c_profile *t3c_active(const t3c_session *session);

/* Which profile the next call runs. Where they fail, the active one stays. Switching copies no weight. */
T3C_API t3c_status t3c_set_profile(t3c_session *session, const char *name);
T3C_API t3c_status t3c_set_budget(t3c_session *session, const t3c_budget *budget);

T3C_API t3c_status t3c_run(t3c_session *session, const t3c_tensor *inputs, size_t input_count,
                           const t3c_tensor **outputs, size_t *output_count);

#ifdef __cplusplus
}
#endif

#endif
