// t3c-run: a .t3c artifact from a shell, on a device that has no Python.
#include <getopt.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "error.h"
#include "npy.h"
#include "t3c.h"

namespace {

constexpr char kUsage[] =
    "t3c-run ARTIFACT --list [--target T]\n"
    "t3c-run ARTIFACT --input FILE... --output FILE... [options]\n"
    "  --input, --output FILE  one for each, in the model's order: .npy, or raw values where it ends otherwise\n"
    "  --target T              one of the artifact's, by default the first that runs here\n"
    "  --profile NAME          by default the greatest\n"
    "  --latency-ms, --energy-mj, --size-mb, --max-drift X   or the profile that a budget gets\n"
    "  --repeat N              then time N calls: 50th and 90th percentile, milliseconds\n"
    "exit codes: 0 done, 1 bad input, 2 usage, 3 no profile fits the budget, 4 missing or damaged artifact\n";
constexpr int kUsageError = 2;

struct Options {
  std::string artifact;
  const char *target = nullptr, *profile = nullptr;
  std::vector<std::string> inputs, outputs;
  t3c_budget budget{};
  bool has_budget = false, list = false;
  long repeat = 0;
};

[[noreturn]] void usage(const std::string& wrong) {
  std::fprintf(stderr, "t3c-run: %s\n%s", wrong.c_str(), kUsage);
  std::exit(kUsageError);
}

double positive(const char* name, const char* text) {
  char* end;
  double value = std::strtod(text, &end);
  if (end == text || *end || !std::isfinite(value) || !(value > 0)) {
    usage(std::string("--") + name + " " + text + " is not a positive number");
  }
  return value;
}

Options parse(int count, char** words) {
  const option known[] = {{"list", no_argument, nullptr, 0},
                          {"help", no_argument, nullptr, 0},
                          {"target", required_argument, nullptr, 0},
                          {"profile", required_argument, nullptr, 0},
                          {"input", required_argument, nullptr, 0},
                          {"output", required_argument, nullptr, 0},
                          {"repeat", required_argument, nullptr, 0},
                          {"latency-ms", required_argument, nullptr, 0},
                          {"energy-mj", required_argument, nullptr, 0},
                          {"size-mb", required_argument, nullptr, 0},
                          {"max-drift", required_argument, nullptr, 0},
                          {nullptr, 0, nullptr, 0}};
  Options options;
  opterr = 0;
  int index = 0;
  for (int found; (found = getopt_long(count, words, "", known, &index)) != -1;) {
    if (found == '?') usage(std::string(words[optind - 1]) + " is unknown or lacks its value");
    std::string name = known[index].name;
    double* limit = name == "latency-ms"  ? &options.budget.latency_ms
                    : name == "energy-mj" ? &options.budget.energy_mj
                    : name == "size-mb"   ? &options.budget.size_mb
                    : name == "max-drift" ? &options.budget.max_drift
                                          : nullptr;
    if (limit) {
      *limit = positive(name.c_str(), optarg);
      options.has_budget = true;
    } else if (name == "help") {
      std::fputs(kUsage, stdout);
      std::exit(0);
    } else if (name == "list") {
      options.list = true;
    } else if (name == "target") {
      options.target = optarg;
    } else if (name == "profile") {
      options.profile = optarg;
    } else if (name == "input") {
      options.inputs.push_back(optarg);
    } else if (name == "output") {
      options.outputs.push_back(optarg);
    } else {
      double calls = positive("repeat", optarg);
      if (calls != std::floor(calls) || calls > 1e9) usage("--repeat takes a whole number");
      options.repeat = std::lround(calls);
    }
  }
  if (optind + 1 != count) usage("name one artifact");
  options.artifact = words[optind];
  if (options.list ? !options.inputs.empty() || !options.outputs.empty() : options.inputs.empty()) {
    usage("either --list or inputs");
  }
  if (options.profile && options.has_budget) usage("either --profile or a budget");
  return options;
}

void check(t3c_status status) {
  if (status != T3C_OK) throw t3c::Error(status, t3c_error());
}

void list(const t3c_session* session) {
  std::printf("target %s\n", t3c_target(session));
  size_t count;
  const t3c_input* inputs = t3c_inputs(session, &count);
  for (size_t i = 0; i < count; ++i) {
    std::printf("input %s %s[", inputs[i].name, inputs[i].dtype);
    for (size_t j = 0; j < inputs[i].rank; ++j) {
      const char* symbol = inputs[i].symbol[j];
      std::string size = symbol ? symbol : std::to_string(inputs[i].shape[j]);
      std::printf("%s%s", j ? ", " : "", size.c_str());
    }
    std::printf("]\n");
  }
  const t3c_profile* profiles = t3c_profiles(session, &count);
  std::printf("%-8s %10s %12s %12s %12s  %s\n", "profile", "size, MB", "latency, ms", "energy, mJ", "drift bound",
              "latency source");
  for (size_t i = 0; i < count; ++i) {
    const t3c_profile& p = profiles[i];
    std::string drift = std::isnan(p.drift_bound) ? "-" : std::to_string(p.drift_bound);
    std::printf("%-8s %10.4g %12.4g %12.4g %12s  %s\n", p.name, p.size_mb, p.latency_ms, p.energy_mj, drift.c_str(),
                p.latency_source);
  }
}

double milliseconds(t3c_session* session, const std::vector<t3c_tensor>& inputs) {
  const t3c_tensor* outputs;
  size_t count;
  auto start = std::chrono::steady_clock::now();
  check(t3c_run(session, inputs.data(), inputs.size(), &outputs, &count));
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
}

// Between the two nearest of sorted `times`, as numpy takes it.
double percentile(const std::vector<double>& times, double share) {
  double place = share * static_cast<double>(times.size() - 1);
  size_t low = static_cast<size_t>(place), high = std::min(low + 1, times.size() - 1);
  return times[low] + (place - static_cast<double>(low)) * (times[high] - times[low]);
}

void run(t3c_session* session, const Options& options) {
  if (options.profile) check(t3c_set_profile(session, options.profile));
  if (options.has_budget) check(t3c_set_budget(session, &options.budget));
  size_t count;
  const t3c_input* wanted = t3c_inputs(session, &count);
  if (options.inputs.size() != count) {
    throw t3c::Error(T3C_BAD_INPUT, std::to_string(options.inputs.size()) + " inputs given, the model takes " +
                                        std::to_string(count));
  }
  std::vector<t3c::Array> arrays;
  std::vector<t3c_tensor> inputs;
  for (size_t i = 0; i < count; ++i) arrays.push_back(t3c::read_array(options.inputs[i], wanted[i]));
  for (const t3c::Array& array : arrays) {
    inputs.push_back({array.dtype.c_str(), array.shape.size(), array.shape.data(), array.bytes.data()});
  }
  const t3c_tensor* outputs;
  check(t3c_run(session, inputs.data(), inputs.size(), &outputs, &count));
  if (options.outputs.size() != count && !options.outputs.empty()) {
    throw t3c::Error(T3C_BAD_INPUT, std::to_string(options.outputs.size()) + " outputs named, the model has " +
                                        std::to_string(count));
  }
  for (size_t i = 0; i < options.outputs.size(); ++i) t3c::write_array(options.outputs[i], outputs[i]);
  std::printf("%s", t3c_active(session)->name);
  if (options.repeat) {
    std::vector<double> times;
    for (long i = 0; i < options.repeat; ++i) times.push_back(milliseconds(session, inputs));
    std::sort(times.begin(), times.end());
    std::printf(": %ld calls, p50 %.4g ms, p90 %.4g ms", options.repeat, percentile(times, 0.5),
                percentile(times, 0.9));
  }
  std::printf("\n");
}

}  // namespace

int main(int count, char** words) {
  Options options = parse(count, words);
  t3c_session* session = nullptr;
  int status = 0;
  try {
    check(t3c_open(options.artifact.c_str(), options.target, &session));
    options.list ? list(session) : run(session, options);
  } catch (const t3c::Error& error) {
    std::fprintf(stderr, "t3c-run: %s\n", error.what());
    status = error.status;
  }
  t3c_close(session);
  return status;
}
