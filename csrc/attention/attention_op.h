// What the attention operators share on their way from tensors to the kernels' arguments.
#pragma once

#include <atomic>
#include <cmath>
#include <tuple>

#include "attention/attention.h"
#include "attention/heads_op.h"
#include "dropout_op.h"
#include "tensor.h"

namespace udl {

template <class T>
inline const T* data_of(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

template <class A>
void sum_sink_gradient(const Attention& args, A* dsinks) {
  const A *sinks = static_cast<const A*>(args.sinks), *lse = static_cast<const A*>(args.lse);
  const A* delta = static_cast<const A*>(args.delta);
  for (int64_t h = 0; h < args.heads; ++h) {
    double sum = 0;
    for (int64_t b = 0; b < args.batches; ++b) {
      for (int64_t i = 0; i < args.queries; ++i) {
        const int64_t at = args.row_at(b, h, i);
        sum -= std::exp(static_cast<double>(sinks[h] - lse[at])) * static_cast<double>(delta[at]);
      }
    }
    dsinks[h] = static_cast<A>(sum);
  }
}

// The gradient of the sinks [H], or an empty tensor.
inline Tensor sink_gradient(const Attention& args, bool wanted) {
  const Dtype acc = acc_dtype(args.dtype);
  Tensor dsinks = empty({wanted ? args.heads : 0}, wanted ? acc : Dtype::f32);
  if (wanted && acc == Dtype::f64) {
    sum_sink_gradient(args, static_cast<double*>(dsinks.mutable_data_ptr()));
  } else if (wanted) {
    sum_sink_gradient(args, static_cast<float*>(dsinks.mutable_data_ptr()));
  }
  return dsinks;
}

// body(task) for every task, each thread taking the next one when it is done: for tasks of unequal
// size, the largest first. `work` is that of all of them, in elements.
template <class Body>
inline void run_tasks(int64_t tasks, int64_t work, const Body& body) {
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), tasks);
  std::atomic<int64_t> next{0};
  const auto drain = [&](int64_t, int64_t) {
    for (int64_t task = next++; task < tasks; task = next++) body(task);
  };
  if (threads <= 1 || work < 2 * kGrainElements) {
    drain(0, 1);
  } else {
    torch::stable::parallel_for(0, threads, 1, drain);
  }
}

}  // namespace udl
