// Element types and reductions of the simulated NCCL: conversion and folding in rank order, nothing else.
//
// Half-width floats accumulate in f32 in rank order and are rounded once, to nearest even, so that the result is the
// same bits on every rank and equals the plain reference. A pre-multiplied sum rounds each product to the type first; fp8
// is multiplied in f16, as NCCL does.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace simnccl {

// Reduction kinds on the wire. The first five are NCCL's; a pre-multiplied sum carries one scalar for each rank.
constexpr int kPreMulSum = 5;

struct Operand {
  const uint8_t* data = nullptr;
  double scale = 1.0;   // floating types
  int64_t iscale = 1;   // integer types
};

// 0 for a value that is no type.
size_t type_size(int type);

float half_to_float(uint16_t bits);
uint16_t float_to_half(float value);
float bfloat_to_float(uint16_t bits);
uint16_t float_to_bfloat(float value);
// FP8: `exponent_bits` is 4 (e4m3, no infinity) or 5 (e5m2).
float fp8_to_float(uint8_t bits, int exponent_bits);
uint8_t float_to_fp8(float value, int exponent_bits);

// Reads one element as the scalar of a pre-multiplied sum.
void read_scalar(int type, const void* from, double* scale, int64_t* iscale);

// Folds `count` elements of all operands, in order, into `out`. False for an unknown type or operation.
bool reduce(int type, int op, const std::vector<Operand>& operands, size_t count, void* out);

}  // namespace simnccl
