// The highest entries of rows, found by a threshold without sorting: see keysift/ops/select.py.
#pragma once

#include "dispatch.h"

extern "C" {

struct ks_choose_args {
  KS_ARGS_HEAD
  const float* score;  // [rows, entries]
  int64_t stride;      // of rows
  int64_t rows;
  int64_t entries;
  const int64_t* count;  // [rows]
  double share;          // of the mass of a row, from 0 to 1; below 0: `count` alone says how many
  int32_t* index;        // [rows, most]
  int64_t most;
  int32_t* used;  // [rows]
};
}

namespace ks {

struct SelectKernels {
  float (*highest)(const float* score, int64_t n);  // -inf where there is none
  // exp(score - top), 0 for what is no number
  void (*masses)(const float* score, int64_t n, float top, float* to);
  // integers in the order of scores; 0 for -inf and for what is no number
  void (*keys)(const float* score, int64_t n, uint32_t* to);
};

KS_DECLARE_TABLES(SelectKernels, select)

// Writes the indices of the `count` highest entries in ascending order, ties by lower index, but none whose key is 0.
// Returns how many they are.
int64_t choose(const uint32_t* keys, int64_t entries, int64_t count, int32_t* index);

}  // namespace ks
