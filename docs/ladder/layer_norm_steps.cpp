// layer_norm's forward in steps, from three plain loops to the library's kernel: each is checked
// against float64 and timed as a share of memcpy, on one thread.
//
//   layer_norm_steps              the shapes of the page
//   layer_norm_steps ROWS COLS    one shape; without times where it is small

#include <cstdio>
#include <cstdlib>

#include "measure.h"
#include "normalization/row_norm.isa.h"

namespace udl::UDL_ISA {
namespace {

template <class T>
struct Job {
  const T* x;
  const T* residual;
  T* sum;
  T* y;
  const float* weight;
  const float* bias;
  float* mean;
  float* rstd;
  int64_t rows, n;
  float eps;
};

// [naive]
template <class T>
void naive(const Job<T>& job) {
  for (int64_t r = 0; r < job.rows; ++r) {
    float sum = 0;
    for (int64_t i = 0; i < job.n; ++i) sum += widen(job.x[r * job.n + i]);
    job.mean[r] = sum / job.n;
  }
  for (int64_t r = 0; r < job.rows; ++r) {
    float squares = 0;
    for (int64_t i = 0; i < job.n; ++i) {
      const float d = widen(job.x[r * job.n + i]) - job.mean[r];
      squares += d * d;
    }
    job.rstd[r] = 1 / std::sqrt(squares / job.n + job.eps);
  }
  for (int64_t r = 0; r < job.rows; ++r) {
    for (int64_t i = 0; i < job.n; ++i) {
      const float x_hat = (widen(job.x[r * job.n + i]) - job.mean[r]) * job.rstd[r];
      narrow(x_hat * job.weight[i] + job.bias[i], job.y + r * job.n + i);
    }
  }
}
// [end]

// [vector]
template <class T>
float mean_of(const T* x, int64_t n) {
  Pack<float> sum{};
  for_packs<T>(n, [&](int64_t i, auto tag) UDL_LAMBDA { sum = sum + load_pack(x + i, tag); });
  return sum_lanes(sum.a + sum.b) / n;
}

template <class T>
float rstd_of(const T* x, int64_t n, float mean, float eps) {
  Pack<float> squares{};
  for_packs<T>(n, [&](int64_t i, auto tag) UDL_LAMBDA {
    const Pack<float> d = keep<T>(load_pack(x + i, tag) - mean, tag);
    squares = squares + d * d;
  });
  return 1 / std::sqrt(sum_lanes(squares.a + squares.b) / n + eps);
}

// The weight and the bias in the order in which a pack of T holds its elements.
template <class T>
struct Parameters {
  PackOrder<T> weight, bias;
};

template <class T>
void write(const T* x, T* y, int64_t n, const Parameters<T>& parameters, float mean, float rstd) {
  const float* weight = parameters.weight.data();
  const float* bias = parameters.bias.data();
  for_packs<T>(n, [=](int64_t i, auto tag) UDL_LAMBDA {
    const Pack<float> x_hat = (load_pack(x + i, tag) - mean) * rstd;
    store_pack(y + i, x_hat * load_ordered<T>(weight + i) + load_ordered<T>(bias + i), tag);
  });
}

template <class T>
void vector(const Job<T>& job) {
  const int64_t n = job.n;
  const Parameters<T> parameters{{job.weight, n}, {job.bias, n}};
  for (int64_t r = 0; r < job.rows; ++r) job.mean[r] = mean_of(job.x + r * n, n);
  for (int64_t r = 0; r < job.rows; ++r) {
    job.rstd[r] = rstd_of(job.x + r * n, n, job.mean[r], job.eps);
  }
  for (int64_t r = 0; r < job.rows; ++r) {
    write(job.x + r * n, job.y + r * n, n, parameters, job.mean[r], job.rstd[r]);
  }
}
// [end]

// [one pass]
template <class T>
void one_pass(const Job<T>& job) {
  const Parameters<T> parameters{{job.weight, job.n}, {job.bias, job.n}};
  for (int64_t r = 0; r < job.rows; ++r) {
    const T* x = job.x + r * job.n;
    job.mean[r] = mean_of(x, job.n);
    job.rstd[r] = rstd_of(x, job.n, job.mean[r], job.eps);
    write(x, job.y + r * job.n, job.n, parameters, job.mean[r], job.rstd[r]);
  }
}
// [end]

// [pipeline]
template <class T>
void pipeline(const Job<T>& job) {
  const Parameters<T> parameters{{job.weight, job.n}, {job.bias, job.n}};
  float next_mean = mean_of(job.x, job.n);
  for (int64_t r = 0; r < job.rows; ++r) {
    const T* x = job.x + r * job.n;
    job.mean[r] = next_mean;
    job.rstd[r] = rstd_of(x, job.n, job.mean[r], job.eps);
    if (r + 1 < job.rows) next_mean = mean_of(x + job.n, job.n);  // while the root is on its way
    write(x, job.y + r * job.n, job.n, parameters, job.mean[r], job.rstd[r]);
  }
}
// [end]

// [prefetch]
template <class T>
void fetch_lines_for_writing(T* y, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / static_cast<int64_t>(sizeof(T))) prefetch_write(y + i);
}

template <class T>
void fetching(const Job<T>& job) {
  const Parameters<T> parameters{{job.weight, job.n}, {job.bias, job.n}};
  float next_mean = mean_of(job.x, job.n);
  for (int64_t r = 0; r < job.rows; ++r) {
    const T* x = job.x + r * job.n;
    T* y = job.y + r * job.n;
    job.mean[r] = next_mean;
    job.rstd[r] = rstd_of(x, job.n, job.mean[r], job.eps);
    if (r + 1 < job.rows) {
      fetch_lines_for_writing(y + job.n, job.n);
      next_mean = mean_of(x + job.n, job.n);
    }
    write(x, y, job.n, parameters, job.mean[r], job.rstd[r]);
  }
}
// [end]

template <class T>
RowNormForward arguments(const Job<T>& job, const T* x) {
  RowNormForward args;
  args.dtype = std::is_same_v<T, bf16> ? Dtype::bf16 : Dtype::f32;
  args.n = job.n;
  args.eps = job.eps;
  args.x.data = x;
  args.x.ndim = 1;
  args.x.size[0] = job.rows;
  args.x.stride[0] = job.n;
  args.weight = job.weight;
  args.bias = job.bias;
  args.y = job.y;
  args.mean = job.mean;
  args.rstd = job.rstd;
  return args;
}

// [library]
template <class T>
void library(const Job<T>& job) {
  row_norm_forward<true>(arguments(job, job.x), 0, job.rows);
}
// [end]

// [fused]
template <class T>
void add_then_norm(const Job<T>& job) {
  for_packs<T>(job.rows * job.n, [&](int64_t i, auto tag) UDL_LAMBDA {
    store_pack(job.sum + i, load_pack(job.residual + i, tag) + load_pack(job.x + i, tag), tag);
  });
  row_norm_forward<true>(arguments(job, static_cast<const T*>(job.sum)), 0, job.rows);
}

template <class T>
void fused_add(const Job<T>& job) {
  RowNormForward args = arguments(job, job.x);
  args.residual = args.x;
  args.residual.data = job.residual;
  args.sum = job.sum;
  row_norm_forward<true>(args, 0, job.rows);
}
// [end]

template <class T>
struct Step {
  const char* name;
  void (*run)(const Job<T>&);
  bool adds;  // whether the residual is part of it
};

template <class T>
const std::vector<Step<T>> kSteps = {
    {"naive", naive<T>, false},
    {"vector", vector<T>, false},
    {"one pass", one_pass<T>, false},
    {"pipeline", pipeline<T>, false},
    {"prefetch", fetching<T>, false},
    {"library", library<T>, false},
    {"add, then norm", add_then_norm<T>, true},
    {"fused add", fused_add<T>, true},
};

// The largest deviation from the formula in float64, over the largest value.
template <class T>
double error_of(const Job<T>& job, bool adds) {
  double largest = 0, deviation = 0;
  std::vector<double> row(static_cast<size_t>(job.n));
  for (int64_t r = 0; r < job.rows; ++r) {
    double mean = 0, squares = 0;
    for (int64_t i = 0; i < job.n; ++i) {
      row[i] = widen(job.x[r * job.n + i]);
      if (adds) {
        T rounded;
        narrow(widen(job.x[r * job.n + i]) + widen(job.residual[r * job.n + i]), &rounded);
        row[i] = widen(rounded);
      }
      mean += row[i] / job.n;
    }
    for (double v : row) squares += (v - mean) * (v - mean);
    const double rstd = 1 / std::sqrt(squares / job.n + job.eps);
    for (int64_t i = 0; i < job.n; ++i) {
      const double exact = (row[i] - mean) * rstd * job.weight[i] + job.bias[i];
      largest = std::max(largest, std::fabs(exact));
      const double found = std::fabs(exact - widen(job.y[r * job.n + i]));
      deviation = found <= deviation ? deviation : found;  // a NaN stays
    }
  }
  return deviation / largest;
}

// Of a second call: the first leaves in the caches what fits there.
double seconds_warm(const std::function<void()>& call) {
  call();
  return seconds(call);
}

// Medians of memcpy and of every step, called in turn.
template <class T>
std::vector<double> times(const Job<T>& job) {
  const size_t bytes = static_cast<size_t>(job.rows * job.n) * sizeof(T);
  std::vector<std::vector<double>> found(kSteps<T>.size() + 1);
  for (int round = 0; round < 31; ++round) {
    found[0].push_back(seconds_warm([&] { std::memcpy(job.y, job.x, bytes); }));
    for (size_t s = 0; s < kSteps<T>.size(); ++s) {
      found[s + 1].push_back(seconds_warm([&] { kSteps<T>[s].run(job); }));
    }
  }
  std::vector<double> medians;
  for (auto& values : found) medians.push_back(median(values));
  return medians;
}

// Prints one shape; whether every step is right.
template <class T>
bool show(const char* dtype, int64_t rows, int64_t n) {
  const Buffer<T> x = random_values<T>(rows * n), residual(x.rbegin(), x.rend());
  const Buffer<float> weight = random_values<float>(n), bias(weight.rbegin(), weight.rend());
  Buffer<T> sum(x.size()), y(x.size());
  Buffer<float> mean(static_cast<size_t>(rows)), rstd(mean);
  const Job<T> job{x.data(),    residual.data(), sum.data(), y.data(), weight.data(), bias.data(),
                   mean.data(), rstd.data(),     rows,       n,        1e-5f};
  const bool timed = rows * n >= 1 << 16;
  const std::vector<double> medians = timed ? times(job) : std::vector<double>{};
  if (timed) std::printf("%s %ld x %ld: memcpy %.1f us\n", dtype, long(rows), long(n), medians[0] * 1e6);
  // The rounding of the result, and that of a plain float32 sum.
  const double eps = std::is_same_v<T, bf16> ? 0x1p-8 : 0x1p-23;
  const double allowed = 4 * eps + std::sqrt(double(n)) * 0x1p-24;
  bool right = true;
  for (size_t s = 0; s < kSteps<T>.size(); ++s) {
    std::fill(y.begin(), y.end(), T{});
    kSteps<T>[s].run(job);
    const double error = error_of(job, kSteps<T>[s].adds);
    const bool ok = error <= allowed;
    right = right && ok;
    std::printf("  %-15s error %.1e%s", kSteps<T>[s].name, error, ok ? "" : " WRONG");
    if (timed) {
      const double copy = medians[0] * (kSteps<T>[s].adds ? 2 : 1);  // twice the bytes
      std::printf("  %9.1f us  %4.0f%% of memcpy", medians[s + 1] * 1e6, 100 * copy / medians[s + 1]);
    }
    std::printf("\n");
  }
  return right;
}

}  // namespace
}  // namespace udl::UDL_ISA

int main(int count, char** words) {
  using namespace udl::UDL_ISA;
  std::vector<std::pair<long, long>> shapes = {{256, 768}, {4096, 768}, {4096, 4096}};
  if (count == 3) shapes = {{std::atol(words[1]), std::atol(words[2])}};
  bool right = true;
  for (auto [rows, n] : shapes) {
    right = show<float>("fp32", rows, n) && right;
    right = show<udl::bf16>("bf16", rows, n) && right;
  }
  return right ? 0 : 1;
}
