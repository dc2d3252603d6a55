// The activations that fused kernels apply to their result.
#pragma once

#include <type_traits>

#include "dtype.h"

namespace udl {

// In the order of ACTIVATIONS in udlkernels/normalization/_activation.py.
enum class Activation : int { identity, relu, leaky_relu, gelu, gelu_tanh, silu };

template <Activation act>
using ActivationTag = std::integral_constant<Activation, act>;

// Calls body(ActivationTag<act>{}).
template <class Body>
UDL_ALWAYS_INLINE void with_activation(Activation act, Body&& body) {
  switch (act) {
    case Activation::identity:
      return body(ActivationTag<Activation::identity>{});
    case Activation::relu:
      return body(ActivationTag<Activation::relu>{});
    case Activation::leaky_relu:
      return body(ActivationTag<Activation::leaky_relu>{});
    case Activation::gelu:
      return body(ActivationTag<Activation::gelu>{});
    case Activation::gelu_tanh:
      return body(ActivationTag<Activation::gelu_tanh>{});
    case Activation::silu:
      return body(ActivationTag<Activation::silu>{});
  }
}

}  // namespace udl
