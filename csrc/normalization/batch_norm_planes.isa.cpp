// Batch norm over planes. While y (or dx) of one group of channels is written, the sums of the next
// group are gathered, chunk by chunk, from lines that were fetched meanwhile.
#include "normalization/batch_norm.h"
#include "normalization/batch_norm.isa.h"

namespace udl::UDL_ISA {
namespace {

struct Group {
  int64_t first, last;
};
constexpr Group kNone{0, 0};

UDL_INLINE Group group_at(const BatchNorm& args, int64_t index) {
  const int64_t together = group_channels(args);
  const int64_t first = index * together;
  return {first, first + together < args.channels ? first + together : args.channels};
}

// body(c, r) over the runs of a chunk, in the order of memory.
template <class Body>
UDL_INLINE void for_runs(const Group& group, const Chunk& chunk, Body body) {
  for (int64_t r = chunk.first_row; r < chunk.last_row; ++r) {
    for (int64_t c = group.first; c < group.last; ++c) body(c, r);
  }
}

// The same run of the group that comes next, to be fetched; `here` where there is none.
template <class T>
UDL_INLINE const T* ahead_of(const Channels& tensor, const Group& group, const Group& next,
                             int64_t c, int64_t r, int64_t begin, const T* here) {
  const int64_t ahead = next.first + (c - group.first);
  return ahead < next.last ? tensor.at<T>(ahead, r) + begin : here;
}

template <class T>
UDL_INLINE Pack<acc_t<T>> plain_sum(const T* x, int64_t n) {
  constexpr int64_t P = kPack<T>;
  Pack<acc_t<T>> s{}, t{};
  int64_t i = 0;
  for (; i + 2 * P <= n; i += 2 * P) {
    s = s + load_pack(x + i, Full{});
    t = t + load_pack(x + i + P, Full{});
  }
  if (i + P <= n) {
    s = s + load_pack(x + i, Full{});
    i += P;
  }
  if (i < n) t = t + load_pack(x + i, Tail{static_cast<int>(n - i)});
  return s + t;
}

// Moments of one chunk of a group: its rounded mean, then the sums of the deviations from it and of
// their squares.
template <class T>
void chunk_moments(const BatchNorm& args, const Group& group, int64_t index) {
  using A = acc_t<T>;
  const Chunk chunk = chunk_of(args, index);
  const int64_t channels = group.last - group.first;
  const A scale = 1 / static_cast<A>(chunk.count());
  Pack<A> sum[kMostTogether], squares[kMostTogether];
  A mean[kMostTogether];
  for (int64_t k = 0; k < channels; ++k) sum[k] = Pack<A>{};
  for_runs(group, chunk, [&](int64_t c, int64_t r) UDL_LAMBDA {
    Pack<A>& total = sum[c - group.first];
    total = total + plain_sum<T>(args.x.at<T>(c, r) + chunk.begin, chunk.n);
  });
  for (int64_t k = 0; k < channels; ++k) {
    mean[k] = sum_lanes(sum[k].a + sum[k].b) * scale;
    sum[k] = squares[k] = Pack<A>{};
  }
  for_runs(group, chunk, [&](int64_t c, int64_t r) UDL_LAMBDA {
    const T* x = args.x.at<T>(c, r) + chunk.begin;
    const int64_t k = c - group.first;
    const A around = mean[k];
    Pack<A> s = sum[k], q = squares[k];
    for_packs<T>(chunk.n, [&](int64_t i, auto tag) UDL_LAMBDA {
      const Pack<A> d = keep<T>(load_pack(x + i, tag) - around, tag);
      s = s + d;
      q = q + d * d;
    });
    sum[k] = s;
    squares[k] = q;
  });
  A* partials = static_cast<A*>(args.partials) + 3 * index * args.channels + group.first;
  for (int64_t k = 0; k < channels; ++k) {
    partials[k] = mean[k];
    partials[args.channels + k] = sum_lanes(sum[k].a + sum[k].b);
    partials[2 * args.channels + k] = sum_lanes(squares[k].a + squares[k].b);
  }
}

template <Kind kKind, class T>
void write_chunk(const BatchNorm& args, const Group& group, const Group& next, int64_t index) {
  const Chunk chunk = chunk_of(args, index);
  for_runs(group, chunk, [&](int64_t c, int64_t r) UDL_LAMBDA {
    const Run<T> run[1] = {{args, c, r, chunk.begin}};
    const T* ahead = ahead_of(args.x, group, next, c, r, chunk.begin, run[0].x);
    write_runs<kKind>(args, run, chunk.n, OneChannel<T>(args, c),
                      [=](int64_t i) UDL_LAMBDA { prefetch_pack(ahead + i); });
  });
}

template <Kind kKind, class T>
void chunk_sums(const BatchNorm& args, const Group& group, int64_t index) {
  using A = acc_t<T>;
  const Chunk chunk = chunk_of(args, index);
  const int64_t channels = group.last - group.first;
  Pack<A> g[kMostTogether], h[kMostTogether];
  for (int64_t k = 0; k < channels; ++k) g[k] = h[k] = Pack<A>{};
  for_runs(group, chunk, [&](int64_t c, int64_t r) UDL_LAMBDA {
    const int64_t k = c - group.first;
    Pack<A> s = g[k], t = h[k];
    const Run<T> run[1] = {{args, c, r, chunk.begin}};
    sum_runs<kKind>(args, run, chunk.n, OneChannel<T>(args, c),
                    [&](int64_t, auto add) UDL_LAMBDA { add(s, t); });
    g[k] = s;
    h[k] = t;
  });
  A* partials = static_cast<A*>(args.partials) + 2 * index * args.channels + group.first;
  for (int64_t k = 0; k < channels; ++k) {
    partials[k] = sum_lanes(g[k].a + g[k].b);
    partials[args.channels + k] = sum_lanes(h[k].a + h[k].b);
  }
}

template <Kind kKind, class T>
void gradient_chunk(const BatchNorm& args, const Group& group, const Group& next, int64_t index) {
  const Chunk chunk = chunk_of(args, index);
  for_runs(group, chunk, [&](int64_t c, int64_t r) UDL_LAMBDA {
    Run<T> run[1] = {{args, c, r, chunk.begin}};
    const T* x = ahead_of(args.x, group, next, c, r, chunk.begin, run[0].x);
    const T* dy = ahead_of(args.dy, group, next, c, r, chunk.begin, run[0].dy);
    const OneChannel<T> values(args, c);
    const auto fetch = [=](int64_t i) UDL_LAMBDA {
      prefetch_pack(x + i);
      prefetch_pack(dy + i);
    };
    if (run[0].dresidual != nullptr) {
      run[0].take_stored_gradient();
      gradient_runs<Kind::identity>(args, run, chunk.n, values, fetch);
    } else {
      gradient_runs<kKind>(args, run, chunk.n, values, fetch);
    }
  });
}

// step(group, chunk) for units [begin, end).
template <class Step>
UDL_INLINE void for_units(const BatchNorm& args, int64_t begin, int64_t end, Step step) {
  for (int64_t unit = begin; unit < end; ++unit) {
    step(group_at(args, unit / args.chunks), unit % args.chunks);
  }
}

// For groups [begin, end): gather(group, chunk), finish(group), write(group, next, chunk), the
// gathering one group ahead of the writing.
template <class Gather, class Finish, class Write>
UDL_INLINE void pipeline(const BatchNorm& args, int64_t begin, int64_t end, Gather gather,
                         Finish finish, Write write) {
  Group group = group_at(args, begin);
  for (int64_t k = 0; k < args.chunks; ++k) gather(group, k);
  for (int64_t index = begin; index < end; ++index) {
    const Group next = index + 1 < end ? group_at(args, index + 1) : kNone;
    finish(group);
    for (int64_t k = 0; k < args.chunks; ++k) {
      write(group, next, k);
      if (next.last > 0) gather(next, k);
    }
    group = next;
  }
}

}  // namespace

void batch_norm_planes_moments(const BatchNorm& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) {
    for_units(args, begin, end, [&](const Group& group, int64_t chunk) {
      chunk_moments<decltype(type)>(args, group, chunk);
    });
  });
}

void batch_norm_planes_write(const BatchNorm& args, int64_t begin, int64_t end) {
  with_kind(args, [&](auto type, auto kind) {
    for_units(args, begin, end, [&](const Group& group, int64_t chunk) {
      write_chunk<decltype(kind)::value, decltype(type)>(args, group, kNone, chunk);
    });
  });
}

void batch_norm_planes_sums(const BatchNorm& args, int64_t begin, int64_t end) {
  with_kind(args, [&](auto type, auto kind) {
    for_units(args, begin, end, [&](const Group& group, int64_t chunk) {
      chunk_sums<decltype(kind)::value, decltype(type)>(args, group, chunk);
    });
  });
}

void batch_norm_planes_gradient(const BatchNorm& args, int64_t begin, int64_t end) {
  with_kind(args, [&](auto type, auto kind) {
    for_units(args, begin, end, [&](const Group& group, int64_t chunk) {
      gradient_chunk<decltype(kind)::value, decltype(type)>(args, group, kNone, chunk);
    });
  });
}

void batch_norm_planes_forward(const BatchNorm& args, int64_t begin, int64_t end) {
  with_kind(args, [&](auto type, auto kind) {
    using T = decltype(type);
    pipeline(
        args, begin, end, [&](const Group& g, int64_t k) { chunk_moments<T>(args, g, k); },
        [&](const Group& g) { batch_norm_finish_moments(args, g.first, g.last); },
        [&](const Group& g, const Group& next, int64_t k) {
          write_chunk<decltype(kind)::value, T>(args, g, next, k);
        });
  });
}

void batch_norm_planes_backward(const BatchNorm& args, int64_t begin, int64_t end) {
  with_kind(args, [&](auto type, auto kind) {
    using T = decltype(type);
    constexpr Kind kKind = decltype(kind)::value;
    pipeline(
        args, begin, end, [&](const Group& g, int64_t k) { chunk_sums<kKind, T>(args, g, k); },
        [&](const Group& g) { batch_norm_finish_sums(args, g.first, g.last); },
        [&](const Group& g, const Group& next, int64_t k) {
          gradient_chunk<kKind, T>(args, g, next, k);
        });
  });
}

}  // namespace udl::UDL_ISA
