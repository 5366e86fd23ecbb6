// The C API: no exception leaves it.
#include "t3c.h"

#include <locale.h>

#include <new>
#include <string>
#include <vector>

#include "error.h"
#include "session.h"

struct t3c_session {
  t3c_session(const char* artifact, const char* target) : session(artifact, target) {
    for (const t3c::Profile& p : session.target().profiles) {
      profiles.push_back({p.name.c_str(), p.size_mb, p.latency_ms, p.latency_source.c_str(), p.energy_mj,
                          p.drift_bound});
    }
    shapes.reserve(session.inputs().size());
    symbols.reserve(session.inputs().size());
    for (const t3c::Input& input : session.inputs()) {
      std::vector<int64_t>& shape = shapes.emplace_back();
      std::vector<const char*>& symbol = symbols.emplace_back();
      for (const t3c::Size& size : input.shape) {
        shape.push_back(size.fixed);
        symbol.push_back(size.fixed == -1 ? size.symbol.c_str() : nullptr);
      }
      inputs.push_back({input.name.c_str(), input.dtype.c_str(), shape.size(), shape.data(), symbol.data()});
    }
  }

  t3c::Session session;
  std::vector<t3c_profile> profiles;
  std::vector<t3c_input> inputs;
  std::vector<std::vector<int64_t>> shapes;
  std::vector<std::vector<const char*>> symbols;
  std::vector<t3c_tensor> outputs;
};

namespace {

thread_local std::string last_error;

// Numbers are read and written with a point, whatever the program's locale.
class PlainNumbers {
 public:
  PlainNumbers() : plain_(newlocale(LC_ALL_MASK, "C", nullptr)), before_(uselocale(plain_)) {}
  ~PlainNumbers() {
    uselocale(before_);
    freelocale(plain_);
  }
  PlainNumbers(const PlainNumbers&) = delete;

 private:
  locale_t plain_, before_;
};

std::vector<t3c::Tensor> tensors(const t3c_tensor* given, size_t count) {
  std::vector<t3c::Tensor> found;
  for (const t3c_tensor* tensor = given; tensor != given + count; ++tensor) {
    const t3c::Dtype* dtype = t3c::find_dtype(tensor->dtype);
    if (!dtype) throw t3c::Error(T3C_BAD_INPUT, std::string("this runner knows no values of type ") + tensor->dtype);
    found.push_back({dtype, {tensor->shape, tensor->shape + tensor->rank}, tensor->data});
  }
  return found;
}

template <typename Work>
t3c_status guarded(Work work) {
  try {
    PlainNumbers guard;
    work();
    return T3C_OK;
  } catch (const t3c::Error& error) {
    last_error = error.what();
    return error.status;
  } catch (const std::bad_alloc&) {
    last_error = "there is not enough memory";
  } catch (const std::exception& error) {
    last_error = error.what();
  }
  return T3C_BAD_ARTIFACT;
}

}  // namespace

t3c_status t3c_open(const char* artifact, const char* target, t3c_session** session) {
  *session = nullptr;
  return guarded([&] { *session = new t3c_session(artifact, target); });
}

void t3c_close(t3c_session* session) { delete session; }

const char* t3c_error(void) { return last_error.c_str(); }

const char* t3c_target(const t3c_session* session) { return session->session.target().name.c_str(); }

const t3c_input* t3c_inputs(const t3c_session* session, size_t* count) {
  *count = session->inputs.size();
  return session->inputs.data();
}

const t3c_profile* t3c_profiles(const t3c_session* session, size_t* count) {
  *count = session->profiles.size();
  return session->profiles.data();
}

const t3c_profile* t3c_active(const t3c_session* session) { return &session->profiles[session->session.active()]; }

t3c_status t3c_set_profile(t3c_session* session, const char* name) {
  return guarded([&] { session->session.set_profile(name); });
}

t3c_status t3c_set_budget(t3c_session* session, const t3c_budget* budget) {
  return guarded([&] { session->session.set_budget(*budget); });
}

t3c_status t3c_run(t3c_session* session, const t3c_tensor* inputs, size_t input_count, const t3c_tensor** outputs,
                   size_t* output_count) {
  *outputs = nullptr;
  *output_count = 0;
  return guarded([&] {
    session->outputs.clear();
    for (const t3c::Tensor& output : session->session.run(tensors(inputs, input_count))) {
      session->outputs.push_back({output.dtype->name, output.shape.size(), output.shape.data(), output.data});
    }
    *outputs = session->outputs.data();
    *output_count = session->outputs.size();
  });
}
