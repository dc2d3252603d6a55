// Working memory of the kernels, and arrays in the order of a type's packs. vec.h includes this file at
// its end; to be included by no other.
#pragma once

namespace udl::UDL_ISA {

// Packs of T from and to accumulation-type arrays that are in T's pack order and hold whole packs
// (see PackOrder).
template <class T>
UDL_INLINE Pack<acc_t<T>> load_ordered(const acc_t<T>* p) {
  return {load(p, Full{}), load(p + kLanes<acc_t<T>>, Full{})};
}
template <class T>
UDL_INLINE void store_ordered(acc_t<T>* p, Pack<acc_t<T>> v) {
  store(p, v.a, Full{});
  store(p + kLanes<acc_t<T>>, v.b, Full{});
}

// Copies n values between natural order and T's pack order; the ordered side holds whole packs.
template <class T>
static void to_pack_order(const acc_t<T>* natural, acc_t<T>* ordered, int64_t n) {
  constexpr int P = kPack<T>, L = P / 2;
  for (int64_t i = 0; i < n; i += P) {
    for (int k = 0; k < P; ++k) {
      const int64_t from = i + (kEvenOdd<T> ? 2 * (k % L) + k / L : k);
      ordered[i + k] = from < n ? natural[from] : acc_t<T>(0);
    }
  }
}
template <class T>
static void from_pack_order(const acc_t<T>* ordered, acc_t<T>* natural, int64_t n) {
  constexpr int P = kPack<T>, L = P / 2;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t k = i % P;
    natural[i] = ordered[i - k + (kEvenOdd<T> ? k / 2 + k % 2 * L : k)];
  }
}
template <class T>
constexpr int64_t whole_packs(int64_t n) {
  return (n + kPack<T> - 1) / kPack<T> * kPack<T>;
}

// Working memory, from the start of a cache line on: a vector that straddles two lines is loaded and
// stored in half the speed.
template <class A>
class Array {
 public:
  explicit Array(int64_t n)
      : memory_(new char[static_cast<size_t>(n) * sizeof(A) + kLine]),
        data_(reinterpret_cast<A*>((reinterpret_cast<uintptr_t>(memory_) + kLine) / kLine * kLine)),
        size_(n) {}
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array() { delete[] memory_; }
  A* data() const { return data_; }
  void clear() { std::memset(data_, 0, static_cast<size_t>(size_) * sizeof(A)); }

 private:
  static constexpr uintptr_t kLine = 64;
  char* memory_;
  A* data_;
  int64_t size_;
};
// Before an array on the stack, to the same end.
#define UDL_LINES alignas(64)

// A parameter vector in T's pack order: the array itself where it already is; null stays null.
template <class T>
class PackOrder {
 public:
  PackOrder(const void* natural, int64_t n)
      : data_(static_cast<const acc_t<T>*>(natural)),
        copy_(is_ordered(natural, n) ? 0 : whole_packs<T>(n)) {
    if (is_ordered(natural, n)) return;
    to_pack_order<T>(data_, copy_.data(), n);
    data_ = copy_.data();
  }
  const acc_t<T>* data() const { return data_; }

 private:
  static bool is_ordered(const void* natural, int64_t n) {
    return natural == nullptr || (!kEvenOdd<T> && n % kPack<T> == 0);
  }
  const acc_t<T>* data_;
  Array<acc_t<T>> copy_;
};

}  // namespace udl::UDL_ISA
