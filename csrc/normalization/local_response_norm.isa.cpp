// The walk over planes: a block of positions at a time, channel after channel, with the sums over
// the window sliding along. (local_response_norm_last.isa.h has the other walk.)
#include "normalization/local_response_norm.h"

#include "normalization/local_response_norm_last.isa.h"

namespace udl::UDL_ISA {
namespace {

// Sums over the last `size` lines pushed, without subtracting: lines come in groups of `size`, and a
// window is the end of one group, summed from its back, and the beginning of the next.
template <class T>
class SlidingSum {
 public:
  using A = acc_t<T>;
  static constexpr int64_t kWidth = LocalResponseNorm::kBlock;

  explicit SlidingSum(int64_t size)
      : array_((size + 2) * kWidth), lines_(array_.data()), size_(size) {}

  // As after `zeros` lines of zeros, zeros < size.
  void start(int64_t zeros) {
    array_.clear();
    line_ = zeros;
  }
  // Adds one pack of the current line and returns its window's sum.
  UDL_INLINE Pack<A> push(int64_t i, Pack<A> term) {
    A* current = lines_ + line_ * kWidth + i;
    A* running = lines_ + (size_ + 1) * kWidth + i;
    const Pack<A> begun = load_ordered<T>(running) + term;
    const Pack<A> older = load_ordered<T>(current + kWidth);  // zeros behind the last line
    store_ordered<T>(current, term);
    store_ordered<T>(running, begun);
    return older + begun;
  }
  void next_line() {
    if (++line_ < size_) return;
    line_ = 0;
    for (int64_t line = size_ - 2; line >= 0; --line) {
      A* to = lines_ + line * kWidth;
      for (int64_t i = 0; i < kWidth; i += kPack<T>) {
        store_ordered<T>(to + i, load_ordered<T>(to + i) + load_ordered<T>(to + kWidth + i));
      }
    }
    std::memset(lines_ + (size_ + 1) * kWidth, 0, kWidth * sizeof(A));
  }

 private:
  Array<A> array_;
  A* lines_;  // [size + 2, kWidth]: a group, a line of zeros, the running sum of the group
  int64_t size_;
  int64_t line_ = 0;
};

template <class A>
UDL_INLINE Pack<A> splat_both(A value) {
  return {splat<A>(value), splat<A>(value)};
}

template <class T>
UDL_INLINE Powers<Pack<acc_t<T>>> pack_powers(Pack<acc_t<T>> s, acc_t<T> beta) {
  const auto a = powers<acc_t<T>>(s.a, beta), b = powers<acc_t<T>>(s.b, beta);
  return {{a.power, b.power}, {a.inverse, b.inverse}};
}

// One block of positions of one sample.
template <class T>
struct PlaneBlock {
  const T *x, *dy;
  T* out;
  int64_t width, x_step, dy_step, out_step;
};

// Both walks return the largest s they met.
template <class T>
vec_t<acc_t<T>> forward_block(const LocalResponseNorm& args, const PlaneBlock<T>& block,
                              SlidingSum<T>& sum) {
  using A = acc_t<T>;
  const int64_t channels = args.x.channels;
  const A scale = static_cast<A>(args.scale), k = static_cast<A>(args.k);
  const A beta = static_cast<A>(args.beta);
  vec_t<A> largest{};
  sum.start(args.before);
  for (int64_t newest = 0; newest < channels + args.after; ++newest) {
    const int64_t c = newest - args.after;
    const T* ahead = block.x + (newest + 1 < channels ? newest + 1 : 0) * block.x_step;
    const T* in = newest < channels ? block.x + newest * block.x_step : nullptr;
    const T* x = block.x + c * block.x_step;
    T* out = c >= 0 ? block.out + c * block.out_step : nullptr;
    for_packs<T>(block.width, [&, ahead, in, x, out](int64_t i, auto tag) UDL_LAMBDA {
      Pack<A> square{};
      prefetch_pack(ahead + i);
      if (in != nullptr) {
        square = load_pack(in + i, tag);
        square = square * square;
      }
      const Pack<A> s = sum.push(i, square) * scale + splat_both(k);
      if (out == nullptr) return;
      largest = larger(largest, larger(s.a, s.b));
      store_pack(out + i, load_pack(x + i, tag) * pack_powers<T>(s, beta).power, tag);
    });
    sum.next_line();
  }
  return largest;
}

// dx = dy s^-beta - 2 scale beta x (sum of q over the channels whose windows hold x),
// q = dy x s^(-beta - 1). `direct` keeps the lines of the first term until the sum is complete.
template <class T>
vec_t<acc_t<T>> backward_block(const LocalResponseNorm& args, const PlaneBlock<T>& block,
                               SlidingSum<T>& squares, SlidingSum<T>& products,
                               acc_t<T>* direct) {
  using A = acc_t<T>;
  const int64_t channels = args.x.channels, kept = args.before + 1;
  const A scale = static_cast<A>(args.scale), k = static_cast<A>(args.k);
  const A beta = static_cast<A>(args.beta);
  const A factor = static_cast<A>(2 * args.scale * args.beta);
  vec_t<A> largest{};
  squares.start(args.before);
  products.start(args.after);
  for (int64_t newest = 0; newest < channels + args.after + args.before; ++newest) {
    const int64_t middle = newest - args.after, c = middle - args.before;
    const T* ahead = block.x + (newest + 1 < channels ? newest + 1 : 0) * block.x_step;
    const T* dy_ahead = block.dy + (middle >= 0 && middle + 1 < channels ? middle + 1 : 0) * block.dy_step;
    const T* in = newest < channels ? block.x + newest * block.x_step : nullptr;
    const bool inside = middle >= 0 && middle < channels;
    const T* x = block.x + middle * block.x_step;
    const T* dy = block.dy + middle * block.dy_step;
    A* direct_in = direct + (inside ? middle % kept : 0) * SlidingSum<T>::kWidth;
    const A* direct_out = direct + (c >= 0 ? c % kept : 0) * SlidingSum<T>::kWidth;
    const T* x_out = block.x + c * block.x_step;
    T* out = c >= 0 ? block.out + c * block.out_step : nullptr;
    for_packs<T>(block.width, [&, ahead, dy_ahead, in, inside, x, dy, direct_in, direct_out, x_out,
                               out](int64_t i, auto tag) UDL_LAMBDA {
      prefetch_pack(ahead + i);
      prefetch_pack(dy_ahead + i);
      Pack<A> square{}, product{};
      if (in != nullptr) {
        square = load_pack(in + i, tag);
        square = square * square;
      }
      const Pack<A> s = squares.push(i, square) * scale + splat_both(k);
      if (inside) {
        largest = larger(largest, larger(s.a, s.b));
        const auto found = pack_powers<T>(s, beta);
        const Pack<A> first = load_pack(dy + i, tag) * found.power;
        store_ordered<T>(direct_in + i, first);
        product = first * load_pack(x + i, tag) * found.inverse;
      }
      if (middle < 0) return;
      const Pack<A> sum = products.push(i, product);
      if (out == nullptr) return;
      const Pack<A> second = load_pack(x_out + i, tag) * factor * sum;
      store_pack(out + i, load_ordered<T>(direct_out + i) - second, tag);
    });
    squares.next_line();
    if (middle >= 0) products.next_line();
  }
  return largest;
}

template <class T>
void run_planes(const LocalResponseNorm& args, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  constexpr int64_t kWidth = SlidingSum<T>::kWidth;
  const int64_t size = args.before + args.after + 1, units = args.units_per_sample();
  const bool backward = args.dy.data != nullptr;
  SlidingSum<T> squares(size), products(backward ? size : 0);
  const Array<A> direct(backward ? (args.before + 1) * kWidth : 0);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t sample = unit / units, first = unit % units * kWidth;
    const int64_t rest = args.x.positions - first;
    PlaneBlock<T> block{args.x.at<T>(sample, 0) + first,
                        backward ? args.dy.at<T>(sample, 0) + first : nullptr,
                        static_cast<T*>(args.out) +
                            sample * args.x.channels * args.x.positions + first,
                        rest < kWidth ? rest : kWidth,
                        args.x.step,
                        args.dy.step,
                        args.x.positions};
    const vec_t<A> largest = backward ? backward_block(args, block, squares, products, direct.data())
                                      : forward_block(args, block, squares);
    if (sizeof(A) == 4 && any_above<A>(largest, kLargestSum)) {
      redo_block<T>(args, block.width, block.x, {block.x_step, 1}, block.dy, {block.dy_step, 1},
                    block.out, {block.out_step, 1});
    }
  }
}

}  // namespace

void local_response_norm(const LocalResponseNorm& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) {
    if (args.x.last) {
      run_last<decltype(type)>(args, begin, end);
    } else {
      run_planes<decltype(type)>(args, begin, end);
    }
  });
}

}  // namespace udl::UDL_ISA
