// What the line kernels of group_norm, forward and backward, share. They go through the memory in
// its order, a few positions (rows) together, so that parameters and sums of a pack of channels are
// loaded once for all of them.
#pragma once

#include "normalization/group_norm.isa.h"
#include "normalization/row_groups.isa.h"

namespace udl::UDL_ISA {
namespace {

UDL_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

struct Chunk {
  int64_t n, index, first, last;  // sample, number within it, positions
};
UDL_INLINE Chunk chunk_of(const GroupNormSizes& args, int64_t unit) {
  const int64_t n = unit / args.chunks, index = unit % args.chunks;
  const int64_t first = index * args.chunk_positions;
  return {n, index, first, least(first + args.chunk_positions, args.positions)};
}

// Whether to take positions together in a pass that reads so many tensors.
UDL_INLINE bool rows_together(const GroupNormSizes& args, int64_t tensors) {
  return fit_together(tensors * args.samples * args.channels * args.positions *
                      element_size(args.dtype));
}

// Where the rows of a tensor start that are taken together, from some channel on.
template <class T, int kCount>
struct RowPointers {
  T* at[kCount];
  RowPointers(T* first, int64_t stride) {
    for (int k = 0; k < kCount; ++k) at[k] = first + k * stride;
  }
};

// Vectors over the channels in whole packs, in natural order or in T's pack order.
template <class T>
class ChannelVectors {
 public:
  using A = acc_t<T>;
  ChannelVectors(int64_t channels, int count)
      : channels_(channels),
        width_(whole_packs<T>(channels)),
        array_(width_ * count),
        data_(array_.data()) {
    array_.clear();
  }

  A* operator[](int index) { return data_ + index * width_; }
  void clear(int count) { std::memset(data_, 0, static_cast<size_t>(width_ * count) * sizeof(A)); }

  // Vectors [0, count) from natural into pack order.
  void arrange(int count) {
    if (!kEvenOdd<T>) return;
    constexpr int P = kPack<T>, L = P / 2;
    for (A* pack = data_; pack < data_ + count * width_; pack += P) {
      A mixed[P];
      for (int i = 0; i < L; ++i) mixed[i] = pack[2 * i];
      for (int i = 0; i < L; ++i) mixed[L + i] = pack[2 * i + 1];
      std::memcpy(pack, mixed, sizeof(mixed));
    }
  }
  // Copies vector `index`, which is in pack order, to `natural`.
  void copy_natural(int index, A* natural) {
    constexpr int P = kPack<T>, L = P / 2;
    const A* ordered = (*this)[index];
    int64_t c = 0;
    for (; kEvenOdd<T> && c + P <= channels_; c += P) {
      for (int i = 0; i < L; ++i) {
        natural[c + 2 * i] = ordered[c + i];
        natural[c + 2 * i + 1] = ordered[c + L + i];
      }
    }
    from_pack_order<T>(ordered + c, natural + c, channels_ - c);
  }

 private:
  int64_t channels_, width_;
  Array<A> array_;
  A* data_;
};

// body(c, g) for every channel and its group.
template <class Body>
UDL_INLINE void for_channels(const GroupNormSizes& args, Body body) {
  for (int64_t g = 0; g < args.groups; ++g) {
    const int64_t first = g * args.group_channels;
    for (int64_t c = first; c < first + args.group_channels; ++c) body(c, g);
  }
}

// Per-channel mean, weight * rstd and shift of a sample, in vectors 0 to 2 and natural order:
// y = (x - mean) * scale + shift.
template <class T, class Args>
void sample_affine(const Args& args, int64_t n, ChannelVectors<T>& vectors) {
  using A = acc_t<T>;
  const A* mean = static_cast<const A*>(args.mean) + n * args.groups;
  const A* rstd = static_cast<const A*>(args.rstd) + n * args.groups;
  const A* rest = static_cast<const A*>(args.rest) + n * args.groups;
  const A* weight = static_cast<const A*>(args.weight);
  const A* bias = static_cast<const A*>(args.bias);
  A *means = vectors[0], *scales = vectors[1], *shifts = vectors[2];
  for_channels(args, [=](int64_t c, int64_t g) UDL_LAMBDA { means[c] = mean[g]; });
  if (weight != nullptr) {
    const A* own = weight + n * args.affine_stride;
    for_channels(args, [=](int64_t c, int64_t g) UDL_LAMBDA { scales[c] = rstd[g] * own[c]; });
  } else {
    for_channels(args, [=](int64_t c, int64_t g) UDL_LAMBDA { scales[c] = rstd[g]; });
  }
  for_channels(args, [=](int64_t c, int64_t g) UDL_LAMBDA { shifts[c] = -rest[g] * scales[c]; });
  if (bias == nullptr) return;
  const A* own = bias + n * args.affine_stride;
  for (int64_t c = 0; c < args.channels; ++c) shifts[c] += own[c];
}

template <class A>
struct Affine {
  Pack<A> mean, scale, shift;
};
template <class T>
UDL_INLINE Affine<acc_t<T>> affine_at(ChannelVectors<T>& vectors, int64_t c) {
  return {load_ordered<T>(vectors[0] + c), load_ordered<T>(vectors[1] + c),
          load_ordered<T>(vectors[2] + c)};
}
template <class A>
UDL_INLINE Pack<A> normalise(Pack<A> x, const Affine<A>& affine) {
  return (x - affine.mean) * affine.scale + affine.shift;
}

// Channels whose values, a few positions together, fill a scratch block of activations.
template <class T>
constexpr int64_t kScratchChannels = kScratch / kRows / kPack<T> * kPack<T>;

// norm(x) + residual of `count` positions from p on and channels [c, c + n), row after row.
template <int kCount, class T, class Args>
void fill_scratch(const Args& args, int64_t sample, int64_t p, int64_t c, int64_t n,
                  ChannelVectors<T>& vectors, acc_t<T>* scratch) {
  using A = acc_t<T>;
  const int64_t row = whole_packs<T>(n);
  const RowPointers<const T, kCount> x(args.x.template at<T>(sample, c, p), args.x.position);
  const bool add = args.residual.data != nullptr;
  const RowPointers<const T, kCount> residual(
      add ? args.residual.template at<T>(sample, c, p) : x.at[0], args.residual.position);
  for_packs<T>(n, [&, c, row, scratch](int64_t i, auto tag) UDL_LAMBDA {
    const Affine<A> affine = affine_at(vectors, c + i);
    for (int k = 0; k < kCount; ++k) {
      Pack<A> pre = normalise(load_pack(x.at[k] + i, tag), affine);
      if (add) pre = pre + load_pack(residual.at[k] + i, tag);
      store_ordered<T>(scratch + k * row + i, pre);
    }
  });
}

}  // namespace
}  // namespace udl::UDL_ISA
