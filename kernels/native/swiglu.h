// SwiGLU of one row and its gradients, shared by the dense op and the experts.
#pragma once
#include "vector.h"

template <class T>
inline void swiglu_row(const T* gate_up, int64_t width, float weight, T* out) {
  for (int64_t f = 0; f < width; f += LANES) {
    const vfloat g = load(gate_up + f, width - f), u = load(gate_up + width + f, width - f);
    store(out + f, g * sigmoid(g) * u * weight, width - f);
  }
}

// Gradients of y = weight * silu(g) * u; returns that of weight. `out` (may be null) gets y again.
template <class T, class G>
inline float swiglu_row_backward(const T* gate_up, const G* grad, int64_t width, float weight, T* grad_gate_up,
                                 T* out) {
  vfloat sum{};
  for (int64_t f = 0; f < width; f += LANES) {
    const int64_t left = width - f;
    const vfloat g = load(gate_up + f, left), u = load(gate_up + width + f, left), d = load(grad + f, left);
    const vfloat s = sigmoid(g), activated = g * s, weighted = d * weight;
    sum += d * activated * u;
    store(grad_gate_up + f, weighted * u * (s + activated * (1.0f - s)), left);
    store(grad_gate_up + width + f, weighted * activated, left);
    if (out != nullptr) store(out + f, activated * u * weight, left);
  }
  return total(sum);
}
