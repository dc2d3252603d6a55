// The walk with channels innermost: some positions at a time, their squares laid out one behind the
// other with zeros between, so that one pass of shifted sums serves them all.
#pragma once

#include "normalization/local_response_norm.isa.h"

namespace udl::UDL_ISA {
namespace {

// window[i] = flat[i] + ... + flat[i + size - 1] for i < n, by doubling; flat holds n + size values
// and a vector to spare, and is used up. Every sum has the elements of its window alone.
template <class A>
void window_sums(A* flat, A* window, int64_t n, int64_t size) {
  int64_t done = 0;
  for (int64_t span = 1; span <= size; span *= 2) {
    if ((size & span) != 0) {
      const A* from = flat + done;
      for (int64_t i = 0; i < n; i += kLanes<A>) {
        const vec_t<A> sum = load(from + i, Full{});
        store(window + i, done == 0 ? sum : load(window + i, Full{}) + sum, Full{});
      }
      done += span;
    }
    if (2 * span > size) break;
    for (int64_t i = 0; i < n + size - span; i += kLanes<A>) {
      store(flat + i, load(flat + i, Full{}) + load(flat + i + span, Full{}), Full{});
    }
  }
}

// body(i, tag) over the vectors of a row of n elements.
template <class A, class Body>
UDL_INLINE void for_vectors(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + kLanes<A> <= n; i += kLanes<A>) body(i, Full{});
  if (i < n) body(i, Tail{static_cast<int>(n - i)});
}

template <class A>
struct Tile {
  A *flat, *window, *direct;
  int64_t stride;    // from one position to the next
  int64_t capacity;  // of each array
};

// A block of `rows` positions; returns the largest s.
template <class T>
vec_t<acc_t<T>> run_tile(const LocalResponseNorm& args, const Tile<acc_t<T>>& tile, int64_t rows,
                         const T* x, const T* dy, T* out) {
  using A = acc_t<T>;
  const int64_t channels = args.x.channels, size = args.before + args.after + 1;
  const A scale = static_cast<A>(args.scale), k = static_cast<A>(args.k);
  const A beta = static_cast<A>(args.beta);
  const A factor = static_cast<A>(2 * args.scale * args.beta);
  vec_t<A> largest{};
  const auto clear = [&] { std::memset(tile.flat, 0, static_cast<size_t>(tile.capacity) * sizeof(A)); };
  const auto for_rows = [=](auto body) UDL_LAMBDA {
    for (int64_t r = 0; r < rows; ++r) {
      for_vectors<A>(channels, [=](int64_t i, auto tag) UDL_LAMBDA {
        body(r, i, r * tile.stride + i, tag);
      });
    }
  };
  const auto s_at = [=](int64_t at) UDL_LAMBDA {
    return load(tile.window + at, Full{}) * scale + k;
  };
  clear();
  for_rows([=](int64_t r, int64_t i, int64_t at, auto tag) UDL_LAMBDA {
    const vec_t<A> v = load(x + r * args.x.step + i, tag);
    store(tile.flat + args.before + at, v * v, tag);
  });
  window_sums(tile.flat, tile.window, rows * tile.stride + kLanes<A>, size);
  if (dy == nullptr) {
    for_rows([=, &largest](int64_t r, int64_t i, int64_t at, auto tag) UDL_LAMBDA {
      const vec_t<A> s = s_at(at);
      largest = larger(largest, s);
      const vec_t<A> v = load(x + r * args.x.step + i, tag);
      store(out + r * channels + i, v * powers<A>(s, beta).power, tag);
    });
    return largest;
  }
  clear();
  for_rows([=, &largest](int64_t r, int64_t i, int64_t at, auto tag) UDL_LAMBDA {
    const vec_t<A> s = s_at(at);
    largest = larger(largest, s);
    const auto found = powers<A>(s, beta);
    const vec_t<A> first = load(dy + r * args.dy.step + i, tag) * found.power;
    store(tile.direct + at, first, tag);
    store(tile.flat + args.after + at, first * load(x + r * args.x.step + i, tag) * found.inverse,
          tag);
  });
  window_sums(tile.flat, tile.window, rows * tile.stride + kLanes<A>, size);
  for_rows([=](int64_t r, int64_t i, int64_t at, auto tag) UDL_LAMBDA {
    const vec_t<A> second = load(x + r * args.x.step + i, tag) * factor * load(tile.window + at, Full{});
    store(out + r * channels + i, load(tile.direct + at, Full{}) - second, tag);
  });
  return largest;
}

template <class T>
void run_last(const LocalResponseNorm& args, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const int64_t channels = args.x.channels, block = args.unit_positions();
  const int64_t units = args.units_per_sample(), size = args.before + args.after + 1;
  const bool backward = args.dy.data != nullptr;
  Tile<A> tile;
  tile.stride = channels + size - 1;
  tile.capacity = block * tile.stride + 2 * size + 4 * kLanes<A>;
  const Array<A> array((backward ? 3 : 2) * tile.capacity);
  tile.flat = array.data();
  tile.window = tile.flat + tile.capacity;
  tile.direct = backward ? tile.window + tile.capacity : nullptr;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t sample = unit / units, first = unit % units * block;
    const int64_t rest = args.x.positions - first, rows = rest < block ? rest : block;
    const T* x = args.x.at<T>(sample, first);
    const T* dy = backward ? args.dy.at<T>(sample, first) : nullptr;
    T* out = static_cast<T*>(args.out) + (sample * args.x.positions + first) * channels;
    const vec_t<A> largest = run_tile(args, tile, rows, x, dy, out);
    if (sizeof(A) == 4 && any_above<A>(largest, kLargestSum)) {
      redo_block<T>(args, rows, x, {1, args.x.step}, dy, {1, args.dy.step}, out, {1, channels});
    }
  }
}

}  // namespace
}  // namespace udl::UDL_ISA
