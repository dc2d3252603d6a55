// Small kernels every family shares: conversion of vectors, and the fixed-order sum of
// partial results.
#pragma once

#include "dtype.h"
#include "isa.h"

// dst[i] = src[i] + add, from one element type to another.
UDL_KERNEL(convert, (Dtype from, const void* src, Dtype to, void* dst, int64_t n, double add))
// out[j] = sum over i of partials[i * width + j] for begin <= j < end, in the order of i and in
// double precision; partials are of out_dtype's accumulation type unless acc says otherwise.
UDL_KERNEL(sum_partials, (Dtype acc, const void* partials, int64_t count, int64_t width,
                          Dtype out_dtype, void* out, int64_t begin, int64_t end))
