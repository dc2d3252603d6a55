// attention's forward in steps, from plain loops to the library's kernel: each is checked against
// float64 and timed as a share of the CPU's multiply-add peak, on one thread.
//
//   attention_steps             the shapes of the page
//   attention_steps T S D       one shape, D even; without times where it is small
//   attention_steps --table     the page's tables (or of one shape: --table T S D)

#include <cstdlib>

#include "columns.h"
#include "peak.h"

namespace udl::UDL_ISA {
namespace {

// One head: T queries, S keys and values, of width D.
template <class T>
struct Job {
  const T *q, *k, *v;
  T* out;
  int64_t queries, keys, width;
  float scale;
  bool causal;  // query i sees keys 0 to i

  bool hidden(int64_t query, int64_t key) const { return causal && key > query; }
};

// [naive]
template <class T>
float dot(const T* a, const T* b, int64_t n) {
  float sum = 0;
  for (int64_t d = 0; d < n; ++d) sum += widen(a[d]) * widen(b[d]);
  return sum;
}

template <class T>
void naive(const Job<T>& job) {
  const int64_t S = job.keys, D = job.width;
  std::vector<float> weights(static_cast<size_t>(job.queries * S));
  for (int64_t i = 0; i < job.queries; ++i) {
    for (int64_t j = 0; j < S; ++j) {
      const float score = dot(job.q + i * D, job.k + j * D, D) * job.scale;
      weights[i * S + j] = job.hidden(i, j) ? -INFINITY : score;
    }
  }
  for (int64_t i = 0; i < job.queries; ++i) {
    float* row = &weights[i * S];
    const float largest = *std::max_element(row, row + S);
    float sum = 0;
    for (int64_t j = 0; j < S; ++j) sum += row[j] = std::exp(row[j] - largest);
    for (int64_t j = 0; j < S; ++j) row[j] /= sum;
  }
  for (int64_t i = 0; i < job.queries; ++i) {
    std::vector<float> out(static_cast<size_t>(D));
    for (int64_t j = 0; j < S; ++j) {
      for (int64_t d = 0; d < D; ++d) out[d] += weights[i * S + j] * widen(job.v[j * D + d]);
    }
    for (int64_t d = 0; d < D; ++d) narrow(out[d], job.out + i * D + d);
  }
}
// [end]

// [tiled]
// A row's sums so far, relative to e^largest: a larger score scales them down.
struct Row {
  float largest = -INFINITY, sum = 0;
  float scores[kKeyBlock];
  std::vector<float> out;
};

template <class T>
void add_keys(const Job<T>& job, Row& row, int64_t query, int64_t first, int64_t n) {
  const int64_t D = job.width;
  const float before = row.largest;
  for (int64_t j = 0; j < n; ++j) {
    const float score = dot(job.q + query * D, job.k + (first + j) * D, D) * job.scale;
    row.scores[j] = job.hidden(query, first + j) ? -INFINITY : score;
    row.largest = std::max(row.largest, row.scores[j]);
  }
  const float factor = std::exp(before - row.largest);  // 0 at first: key 0 is seen by all
  row.sum *= factor;
  for (float& v : row.out) v *= factor;
  for (int64_t j = 0; j < n; ++j) {
    const float weight = std::exp(row.scores[j] - row.largest);
    row.sum += weight;
    const T* value = job.v + (first + j) * D;
    for (int64_t d = 0; d < D; ++d) row.out[d] += weight * widen(value[d]);
  }
}

template <class T>
void tiled(const Job<T>& job) {
  constexpr int64_t kRows = 16;
  for (int64_t start = 0; start < job.queries; start += kRows) {
    const int64_t count = least(kRows, job.queries - start);
    std::vector<Row> rows(kRows);
    for (Row& row : rows) row.out.resize(static_cast<size_t>(job.width));
    for (int64_t first = 0; first < job.keys; first += kKeyBlock) {
      const int64_t n = least(kKeyBlock, job.keys - first);
      for (int64_t i = 0; i < count; ++i) add_keys(job, rows[i], start + i, first, n);
    }
    for (int64_t i = 0; i < count; ++i) {
      T* out = job.out + (start + i) * job.width;
      for (int64_t d = 0; d < job.width; ++d) narrow(rows[i].out[d] / rows[i].sum, out + d);
    }
  }
}
// [end]

// [tile]
template <class E>
using lanes_of = std::conditional_t<std::is_same_v<E, float>, f32v, u32v>;
UDL_INLINE f32v multiply_add(f32v a, f32v b, f32v sum) { return a * b + sum; }
UDL_INLINE f32v multiply_add(u32v a, u32v b, f32v sum) { return add_pairs(sum, a, b); }

// The number (i, d) of what is read in place stands at data[i * row + d * step].
template <class E>
struct Left {
  const E* data;
  int64_t row, step;
};

// out[i][lanes] = factor * sum over d of left(i, d) * right[d][lanes], or that sum added to it.
template <int kRows, bool kAdd, class E>
UDL_INLINE void tile(Left<E> left, const E* right, int64_t depth, float factor, float* out) {
  constexpr int64_t L = kLanes<float>, B = kVectors * L;
  f32v sums[kRows][kVectors] = {};
  for (int64_t d = 0; d < depth; ++d) {
    lanes_of<E> lanes[kVectors];
    for (int r = 0; r < kVectors; ++r) std::memcpy(&lanes[r], right + d * B + r * L, sizeof(f32v));
    for (int i = 0; i < kRows; ++i) {
      E one;
      std::memcpy(&one, left.data + i * left.row, sizeof(one));
      const lanes_of<E> all = lanes_of<E>{} + one;
      for (int r = 0; r < kVectors; ++r) sums[i][r] = multiply_add(all, lanes[r], sums[i][r]);
    }
    left.data += left.step;
  }
  for (int i = 0; i < kRows; ++i) {
    for (int r = 0; r < kVectors; ++r) {
      float* at = out + i * B + r * L;
      const f32v sum = sums[i][r];
      store(at, kAdd ? load(static_cast<const float*>(at), Full{}) + sum : sum * factor, Full{});
    }
  }
}

template <bool kAdd, class E>
void multiply(Left<E> left, int64_t rows, const E* right, int64_t depth, float factor, float* out) {
  int64_t i = 0;
  const auto next = [&](auto count) UDL_LAMBDA {
    constexpr int kRows = decltype(count)::value;
    const Left<E> from{left.data + i * left.row, left.row, left.step};
    tile<kRows, kAdd>(from, right, depth, factor, out + i * kQueryBlock<float>);
    i += kRows;
  };
  while (i + kTile <= rows) next(std::integral_constant<int, kTile>{});
  while (i + 2 <= rows) next(std::integral_constant<int, 2>{});
  if (i < rows) next(std::integral_constant<int, 1>{});
}
// [end]

// [lanes]
// A block of queries, one a lane: everything of it is [number][lane].
struct Block {
  static constexpr int64_t B = kQueryBlock<float>;
  explicit Block(int64_t width)
      : queries(width * B), scores(kKeyBlock * B), out(width * B), copy(kKeyBlock * width) {}
  Array<float> queries, scores, out, copy;
  UDL_LINES float largest[B], sum[B], factor[B];
};

struct Lanes {
  explicit Lanes(int64_t) {}
  static constexpr float kUnit = 1;
  static f32v power(f32v x) {
    for (int i = 0; i < kLanes<float>; ++i) x[i] = std::exp(x[i]);
    return x;
  }
  static bool moved(f32v) { return true; }
  template <class T>
  static int64_t keys_seen(const Job<T>& job, int64_t) {
    return job.keys;
  }
  template <class T>
  void turn_queries(const Job<T>& job, Block& block, int64_t first, int64_t count) {
    turn_rows(job.q + first * job.width, job.width, count, job.width, block.queries.data());
  }
  template <class T>
  void multiply_keys(const Job<T>& job, Block& block, int64_t first, int64_t n, float factor) {
    const T* rows = job.k + first * job.width;
    // float32 where it lies, bfloat16 widened into the copy.
    const Panel<T> keys = panel_of(rows, job.width, n, job.width, block.copy.data());
    multiply<false>(Left<float>{keys.data, keys.stride, 1}, n,
                    static_cast<const float*>(block.queries.data()), job.width, factor,
                    block.scores.data());
  }
  template <class T>
  void add_values(const Job<T>& job, Block& block, int64_t first, int64_t n) {
    const T* rows = job.v + first * job.width;
    const Panel<T> values = panel_of(rows, job.width, n, job.width, block.copy.data());
    multiply<true>(Left<float>{values.data, 1, values.stride}, job.width,
                   static_cast<const float*>(block.scores.data()), n, 1, block.out.data());
  }
};

void hide_keys(Block& block, int64_t query, int64_t first, int64_t n) {
  if (first + n - 1 <= query) return;
  for_scores(kVectors, block.scores.data(), n, [=](f32v score, int r, int64_t k) UDL_LAMBDA {
    const f32v behind = lane_numbers<float>(r) - static_cast<float>(first + k - query);
    return behind < 0 ? splat<float>(-INFINITY) : score;
  });
}

// Scores become weights; what was summed before is scaled down where the maximum moved.
template <class Stage>
void soften(Block& block, int64_t n, int64_t width) {
  constexpr int64_t L = kLanes<float>, B = Block::B;
  bool moved = false;
  for (int64_t i = 0; i < B; i += L) {
    float* scores = block.scores.data() + i;
    const auto score = [=](int64_t k) UDL_LAMBDA {
      return load(static_cast<const float*>(scores) + k * B, Full{});
    };
    const f32v before = load(static_cast<const float*>(block.largest) + i, Full{});
    f32v largest = before;
    for (int64_t k = 0; k < n; ++k) largest = score(k) > largest ? score(k) : largest;
    const f32v factor = Stage::power(before - largest);
    f32v sum = load(static_cast<const float*>(block.sum) + i, Full{}) * factor;
    for (int64_t k = 0; k < n; ++k) {
      const f32v weight = Stage::power(score(k) - largest);
      sum += weight;
      store(scores + k * B, weight, Full{});
    }
    store(block.largest + i, largest, Full{});
    store(block.sum + i, sum, Full{});
    store(block.factor + i, factor, Full{});
    moved = Stage::moved(factor) || moved;
  }
  if (!moved) return;
  for_scores(kVectors, block.out.data(), width, [&](f32v v, int r, int64_t) UDL_LAMBDA {
    return v * load(static_cast<const float*>(block.factor) + r * L, Full{});
  });
}

template <class Stage, class T>
void by_lanes(const Job<T>& job) {
  Block block(job.width);
  Stage stage(job.width);
  for (int64_t query = 0; query < job.queries; query += Block::B) {
    const int64_t rows = least(Block::B, job.queries - query);
    stage.turn_queries(job, block, query, rows);
    block.out.clear();
    std::fill_n(block.largest, Block::B, -INFINITY);
    std::fill_n(block.sum, Block::B, 0.0f);
    const int64_t keys = Stage::keys_seen(job, query + rows - 1);
    for (int64_t first = 0; first < keys; first += kKeyBlock) {
      const int64_t n = least(kKeyBlock, keys - first);
      stage.multiply_keys(job, block, first, n, job.scale * Stage::kUnit);
      if (job.causal) hide_keys(block, query, first, n);
      soften<Stage>(block, n, job.width);
      stage.add_values(job, block, first, n);
    }
    for (int64_t i = 0; i < Block::B; ++i) block.factor[i] = 1 / block.sum[i];
    turn_back(static_cast<const float*>(block.out.data()), job.width,
              static_cast<const float*>(block.factor), rows, job.out + query * job.width,
              job.width);
  }
}
// [end]

// [exp]
// 2^x for x <= 0: x = n + f with n whole and f in [-1/2, 1/2]; a polynomial gives 2^f, and n is
// added to its exponent. Below 2^-126 it is 0.
UDL_INLINE f32v power_of_two(f32v x) {
  constexpr float kRound = 0x1.8p23f;  // a sum with it has no bits below 1: its lowest hold n
  const f32v shifted = x + kRound, f = x - (shifted - kRound);
  f32v p = splat<float>(1.5356866e-4f);
  p = p * f + 1.3398959e-3f;
  p = p * f + 9.618423e-3f;
  p = p * f + 5.5503324e-2f;
  p = p * f + 0.24022648f;
  p = p * f + 0.6931472f;
  p = p * f + 1.0f;
  const i32v bits = bit_cast<i32v>(p) + (bit_cast<i32v>(shifted) << 23);
  return x < -126.0f ? f32v{} : bit_cast<f32v>(bits);
}

struct VectorExp : Lanes {
  using Lanes::Lanes;
  static constexpr float kUnit = static_cast<float>(kLog2E);  // exp(x) = 2^(x log2(e))
  static f32v power(f32v x) { return power_of_two(x); }
};
// [end]

// [skip]
struct Skip : VectorExp {
  using VectorExp::VectorExp;
  static bool moved(f32v factor) {
    const auto changed = factor != 1;
    bool any = false;
    for (int i = 0; i < kLanes<float>; ++i) any = any || changed[i] != 0;
    return any;
  }
  template <class T>
  static int64_t keys_seen(const Job<T>& job, int64_t last_query) {
    return job.causal ? least(job.keys, last_query + 1) : job.keys;
  }
};
// [end]

// [pairs]
struct Pairs : Skip {
  explicit Pairs(int64_t width)
      : Skip(width),
        row(whole_lanes<float>(width)),
        queries(width / 2 * Block::B),
        weights(kKeyBlock / 2 * Block::B),
        values(kKeyBlock / 2 * row) {}
  int64_t row;
  Array<uint32_t> queries, weights, values;
  using Pair = const uint32_t*;

  void turn_queries(const Job<bf16>& job, Block&, int64_t first, int64_t count) {
    turn_pairs(job.q + first * job.width, job.width, count, job.width, queries.data());
  }
  void multiply_keys(const Job<bf16>& job, Block& block, int64_t first, int64_t n, float factor) {
    const Left<uint32_t> left{reinterpret_cast<Pair>(job.k + first * job.width), job.width / 2, 1};
    multiply<false>(left, n, Pair(queries.data()), job.width / 2, factor, block.scores.data());
  }
  void add_values(const Job<bf16>& job, Block& block, int64_t first, int64_t n) {
    pair_keys(block.scores.data(), n, weights.data());
    pair_rows(job.v + first * job.width, job.width, n, job.width, row, values.data());
    const Left<uint32_t> left{values.data(), 1, row};
    multiply<true>(left, job.width, Pair(weights.data()), (n + 1) / 2, 1, block.out.data());
  }
};
// [end]

// [library]
template <class T>
void library(const Job<T>& job) {
  const auto rows = [&](const T* data) { return Heads{data, 0, 0, job.width}; };
  Attention args;
  args.dtype = std::is_same_v<T, bf16> ? Dtype::bf16 : Dtype::f32;
  args.batches = args.heads = args.key_heads = 1;
  args.queries = args.row_stride = job.queries;
  args.keys = job.keys;
  args.width = args.value_width = job.width;
  args.q = rows(job.q);
  args.k = rows(job.k);
  args.v = rows(job.v);
  args.out = rows(job.out);
  args.scale = job.scale;
  args.left = job.queries + job.keys;
  args.right = job.causal ? 0 : args.left;
  std::vector<float> lse(static_cast<size_t>(job.queries));
  std::vector<uint8_t> unclean(static_cast<size_t>(key_blocks(args)));
  args.lse = lse.data();
  args.unclean = unclean.data();
  attention_find_unclean(args, 0, 1);
  attention_forward(args, 0, (job.queries + Block::B - 1) / Block::B);
}
// [end]

template <class T>
struct Step {
  const char* name;
  void (*run)(const Job<T>&);  // null where this CPU lacks the instruction
};

template <class T>
std::vector<Step<T>> steps() {
  std::vector<Step<T>> found = {{"naive", naive<T>},
                                {"tiled", tiled<T>},
                                {"lanes", by_lanes<Lanes, T>},
                                {"vector exp", by_lanes<VectorExp, T>},
                                {"skip", by_lanes<Skip, T>}};
  if constexpr (std::is_same_v<T, bf16>) {
    found.push_back({"pairs", kHasPairs<T> ? by_lanes<Pairs, T> : nullptr});
  }
  found.push_back({"library", library<T>});
  return found;
}

template <class T>
std::vector<double> exact_result(const Job<T>& job) {
  const int64_t S = job.keys, D = job.width;
  std::vector<double> out(static_cast<size_t>(job.queries * D)), row(static_cast<size_t>(S));
  for (int64_t i = 0; i < job.queries; ++i) {
    double sum = 0;
    for (int64_t j = 0; j < S && !job.hidden(i, j); ++j) {
      double score = 0;
      for (int64_t d = 0; d < D; ++d) {
        score += static_cast<double>(widen(job.q[i * D + d])) * widen(job.k[j * D + d]);
      }
      sum += row[j] = std::exp(score * job.scale);  // of small scores: no maximum needed
    }
    for (int64_t j = 0; j < S && !job.hidden(i, j); ++j) {
      for (int64_t d = 0; d < D; ++d) out[i * D + d] += row[j] / sum * widen(job.v[j * D + d]);
    }
  }
  return out;
}

// Medians of the peak and of every step, in turn.
template <class T>
void measure(const Job<T>& job, double flops, Column& column) {
  const std::vector<Step<T>> list = steps<T>();
  std::vector<std::vector<double>> found(list.size() + 1);
  for (int rounds = flops < 3e8 ? 31 : 7; rounds > 0; --rounds) {
    found.back().push_back(peak_rate<T>());
    for (size_t s = 0; s < list.size(); ++s) {
      if (list[s].run == nullptr) continue;
      found[s].push_back(flops / seconds([&] { list[s].run(job); }));
    }
  }
  column.peak = median(found.back());
  for (size_t s = 0; s < list.size(); ++s) {
    if (!found[s].empty()) column.lines[s].rate = median(found[s]);
  }
}

// The rounding of result and weights, of a float32 sum over the keys, and of scores up to 16.
template <class T>
double allowed_error(const Job<T>& job) {
  const double eps = std::is_same_v<T, bf16> ? 0x1p-8 : 0x1p-23;
  return 2 * eps + 0x1p-24 * (std::sqrt(double(job.keys)) + 16 * std::sqrt(double(job.width)));
}

// Whether each step is right.
template <class T>
bool check(const Job<T>& job, Column& column) {
  const std::vector<double> exact = exact_result(job);
  bool right = true;
  for (const Step<T>& step : steps<T>()) {
    column.lines.push_back({step.name, step.run == nullptr, 0, 0});
    if (step.run == nullptr) continue;
    std::fill_n(job.out, exact.size(), T{});
    step.run(job);
    const double error = column.lines.back().error = deviation(exact, job.out);
    if (error <= allowed_error(job)) continue;
    right = false;
    std::fprintf(stderr, "%s, %s: WRONG by %.1e\n", column.title.c_str(), step.name, error);
  }
  return right;
}

struct Shape {
  int64_t queries, keys, width;
};

template <class T>
bool show(const std::string& dtype, const std::vector<Shape>& shapes, bool table) {
  std::vector<Column> columns;
  bool right = true;
  for (const Shape& shape : shapes) {
    const int64_t count = shape.queries * shape.width, S = shape.keys, D = shape.width;
    const Buffer<T> q = random_values<T>(count, 8, 1);  // scores up to 16
    const Buffer<T> k = random_values<T>(S * D, 1, 2), v = random_values<T>(S * D, 1, 3);
    Buffer<T> out(q.size());
    const std::string title = dtype + ", " + std::to_string(shape.queries) + " x " +
                              std::to_string(S) + " x " + std::to_string(D);
    for (const bool causal : {false, true}) {
      const float scale = 1 / std::sqrt(static_cast<float>(D));
      const Job<T> job{q.data(), k.data(), v.data(), out.data(), shape.queries,
                       S,        D,        scale,    causal};
      Column column{title + (causal ? ", causal" : ""), 0, {}};
      right = check(job, column) && right;
      double seen = 0;  // scores that count
      for (int64_t i = 0; i < job.queries; ++i) seen += double(causal ? least(i + 1, S) : S);
      if (table || count * S >= 1 << 20) measure(job, 4 * seen * double(D), column);
      if (!table) print_text(column);
      columns.push_back(column);
    }
  }
  if (table) print_table(columns);
  return right;
}

}  // namespace
}  // namespace udl::UDL_ISA

int main(int count, char** words) {
  using namespace udl::UDL_ISA;
  std::vector<Shape> shapes = {{512, 512, 64}, {2048, 2048, 64}, {2048, 2048, 128}};
  const bool table = count > 1 && std::string(words[1]) == "--table";
  if (table) --count, ++words;
  if (count == 4) shapes = {{std::atol(words[1]), std::atol(words[2]), std::atol(words[3])}};
  const auto [queries, keys, width] = shapes[0];
  if ((count != 1 && count != 4) || queries < 1 || keys < 1 || width < 1 || width % 2 != 0) {
    std::fprintf(stderr, "usage: attention_steps [--table] [T S D], D even\n");
    return 2;
  }
  const bool right = show<float>("fp32", shapes, table);
  return show<udl::bf16>("bf16", shapes, table) && right ? 0 : 1;
}
