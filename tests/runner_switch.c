/* A user of the C API, in C: loads an artifact once, then runs the profiles named, switching between two calls.
 *
 *   runner_switch ARTIFACT TARGET X0 X1 OUTPUT PROFILE...
 *
 * X0 and X1 are raw values of two inputs with 3 rows; all outputs of all calls are appended to OUTPUT.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "t3c.h"

static void check(int done, const char *what) {
  if (done) return;
  fprintf(stderr, "%s: %s\n", what, t3c_error());
  exit(1);
}

static size_t values(const t3c_tensor *tensor) {
  size_t count = 1;
  for (size_t i = 0; i < tensor->rank; ++i) count *= (size_t)tensor->shape[i];
  return count;
}

int main(int count, char **words) {
  enum { ROWS = 3, MOST = 4096 };
  static char data[2][MOST];
  t3c_session *session;
  t3c_tensor inputs[2];
  int64_t shapes[2][4];
  size_t number;
  FILE *output = fopen(words[5], "wb");
  check(count > 6 && output != NULL, "arguments");
  check(t3c_open("/nowhere.t3c", NULL, &session) == T3C_BAD_ARTIFACT && session == NULL, "a missing artifact");
  check(t3c_open(words[1], words[2], &session) == T3C_OK, "open");
  check(strcmp(t3c_target(session), words[2]) == 0, "target");

  const t3c_input *wanted = t3c_inputs(session, &number);
  check(number == 2, "number of inputs");
  for (size_t i = 0; i < number; ++i) {
    FILE *file = fopen(words[3 + i], "rb");
    check(file != NULL && fread(data[i], 1, MOST, file) > 0, words[3 + i]);
    fclose(file);
    for (size_t j = 0; j < wanted[i].rank; ++j) shapes[i][j] = wanted[i].symbol[j] ? ROWS : wanted[i].shape[j];
    /* The second input begins where vectors may not: the runner has to copy it. */
    memmove(data[i] + 4 * i, data[i], MOST - 4 * i);
    inputs[i] = (t3c_tensor){wanted[i].dtype, wanted[i].rank, shapes[i], data[i] + 4 * i};
  }

  const t3c_profile *profiles = t3c_profiles(session, &number);
  check(t3c_active(session) == &profiles[number - 1], "the greatest profile is active");
  for (int i = 6; i < count; ++i) {
    const t3c_tensor *outputs;
    size_t output_count;
    check(t3c_set_profile(session, words[i]) == T3C_OK, words[i]);
    check(t3c_set_profile(session, "p99") == T3C_BAD_INPUT && strstr(t3c_error(), "p99"), "no such profile");
    check(strcmp(t3c_active(session)->name, words[i]) == 0, "the active profile stays");
    check(t3c_run(session, inputs, 2, &outputs, &output_count) == T3C_OK, "run");
    for (size_t j = 0; j < output_count; ++j) {
      check(strcmp(outputs[j].dtype, "float32") == 0, "dtype of outputs");
      fwrite(outputs[j].data, sizeof(float), values(&outputs[j]), output);
    }
  }
  for (size_t i = 0; i < number; ++i) {
    t3c_budget budget = {0};
    budget.size_mb = profiles[i].size_mb;
    check(t3c_set_budget(session, &budget) == T3C_OK && t3c_active(session) == &profiles[i], "budget of a size");
    check(isnan(profiles[i].drift_bound), "no certificate");
  }
  t3c_close(session);
  return fclose(output);
}
