// Choice of the instruction set. Every *.isa.cpp is compiled once per ISA into its own namespace;
// UDL_KERNEL declares a function in all of them, UDL_CALL picks the active one at run time.
#pragma once

#include <cstdint>

#if defined(UDL_X86)
#define UDL_ISAS(X) X(base) X(avx2) X(avx512) X(avx512_bf16)
#else
#define UDL_ISAS(X) X(neon)
#endif

namespace udl {

enum class Isa : int {
#define UDL_ENUM(name) name,
  UDL_ISAS(UDL_ENUM)
#undef UDL_ENUM
      count
};

// The ISA in use: the best of this CPU, or the one named by UDLKERNELS_ISA or udlkernels_isa_set.
Isa active_isa();

}  // namespace udl

#if defined(UDL_X86)
#define UDL_KERNEL(name, args)       \
  namespace udl::base {              \
  void name args;                    \
  }                                  \
  namespace udl::avx2 {              \
  void name args;                    \
  }                                  \
  namespace udl::avx512 {            \
  void name args;                    \
  }                                  \
  namespace udl::avx512_bf16 {       \
  void name args;                    \
  }
#define UDL_CALL(name)                                                              \
  (::udl::active_isa() == ::udl::Isa::avx512_bf16 ? &::udl::avx512_bf16::name       \
   : ::udl::active_isa() == ::udl::Isa::avx512    ? &::udl::avx512::name            \
   : ::udl::active_isa() == ::udl::Isa::avx2      ? &::udl::avx2::name              \
                                                  : &::udl::base::name)
#else
#define UDL_KERNEL(name, args) \
  namespace udl::neon {        \
  void name args;              \
  }
#define UDL_CALL(name) (&::udl::neon::name)
#endif
