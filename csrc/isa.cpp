#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace udl {
namespace {

const char* const kNames[] = {
#define UDL_NAME(name) #name,
    UDL_ISAS(UDL_NAME)
#undef UDL_NAME
};
constexpr int kCount = static_cast<int>(Isa::count);

bool supported(Isa isa) {
#if defined(UDL_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  switch (isa) {
    case Isa::base:
      return true;
    case Isa::avx2:
      return avx2;
    case Isa::avx512:
      return avx512;
    case Isa::avx512_bf16:
      return avx512 && __builtin_cpu_supports("avx512bf16");
    default:
      return false;
  }
#else
  return isa == Isa::neon;
#endif
}

Isa best_isa() {
  int best = 0;
  for (int i = 0; i < kCount; ++i) {
    if (supported(static_cast<Isa>(i))) best = i;
  }
  return static_cast<Isa>(best);
}

// The index of a name that this CPU can run, or -1.
int find(const char* name) {
  for (int i = 0; i < kCount; ++i) {
    if (std::strcmp(name, kNames[i]) == 0 && supported(static_cast<Isa>(i))) return i;
  }
  return -1;
}

Isa initial_isa() {
  const char* forced = std::getenv("UDLKERNELS_ISA");
  const int index = forced != nullptr ? find(forced) : -1;
  return index >= 0 ? static_cast<Isa>(index) : best_isa();
}

std::atomic<Isa>& slot() {
  static std::atomic<Isa> isa{initial_isa()};
  return isa;
}

}  // namespace

Isa active_isa() { return slot().load(std::memory_order_relaxed); }

}  // namespace udl

#define UDL_EXPORT extern "C" __attribute__((visibility("default")))

UDL_EXPORT const char* udlkernels_isa_built() {
#define UDL_LIST(name) #name ","
  return UDL_ISAS(UDL_LIST);
#undef UDL_LIST
}

UDL_EXPORT const char* udlkernels_isa_found() {
  return udl::kNames[static_cast<int>(udl::best_isa())];
}

UDL_EXPORT const char* udlkernels_isa_active() {
  return udl::kNames[static_cast<int>(udl::active_isa())];
}

UDL_EXPORT int udlkernels_isa_set(const char* name) {
  const int index = udl::find(name);
  if (index < 0) return 1;
  udl::slot().store(static_cast<udl::Isa>(index));
  return 0;
}
