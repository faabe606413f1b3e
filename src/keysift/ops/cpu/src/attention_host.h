// What the files that prepare attention share; compiled once.
#pragma once

#include <initializer_list>

#include "attention.h"

namespace ks {

inline const void* element(const void* base, int32_t dtype, int64_t at) {
  return (const char*)base + at * bytes_of(dtype);
}

// Parts of one piece of memory, each aligned to 64 bytes.
class Blocks {
 public:
  Blocks(std::initializer_list<int64_t> bytes) {
    for (int64_t size : bytes) {
      begin_[count_ + 1] = (begin_[count_] + size + 63) / 64 * 64;
      count_++;
    }
  }
  int64_t at(int part) const { return begin_[part]; }
  int64_t end() const { return begin_[count_]; }

 private:
  int64_t begin_[9] = {};
  int count_ = 0;
};

// Threads that pay: a thread that sleeps is awake about when 64 KB are read.
inline int worth(int threads, int64_t bytes) {
  const int64_t most = 1 + bytes / (int64_t(64) << 10);
  return int(most < threads ? most : threads);
}

inline int64_t shift_of(int64_t page) {
  return page > 0 && (page & (page - 1)) == 0 ? __builtin_ctzll(uint64_t(page)) : -1;
}

inline bool known_dtype(int32_t dtype) { return dtype >= FP32 && dtype <= FP16; }

template <class Args>
void check_keys(const Args& a) {
  require(a.batch >= 0 && a.heads >= 0 && a.kv_heads >= 1 && a.heads % a.kv_heads == 0,
          "query heads have to be a multiple of KV heads");
  require(a.dim >= 1 && a.v_dim >= 1, "head dims have to be at least 1");
  require(known_dtype(a.q_dtype) && known_dtype(a.kv_dtype) && known_dtype(a.out_dtype), "an unknown dtype");
  require(!a.table || a.page >= 1, "a page has to have rows");
}

template <class Args>
Reach reach_of(const Args& a, int64_t b, int64_t kv_head) {
  const int64_t size = bytes_of(a.kv_dtype), own = a.table ? 0 : b;
  Reach reach;
  reach.k = (const char*)a.k + size * (own * a.k_stride0 + kv_head * a.k_stride2);
  reach.v = (const char*)a.v + size * (own * a.v_stride0 + kv_head * a.v_stride2);
  reach.k_page = size * a.k_stride0;
  reach.k_row = size * a.k_stride1;
  reach.k_head = size * a.k_stride2;
  reach.v_page = size * a.v_stride0;
  reach.v_row = size * a.v_stride1;
  reach.v_head = size * a.v_stride2;
  reach.table = a.table ? a.table + b * a.table_stride : nullptr;
  reach.page = a.page;
  reach.pages = a.pages;
  reach.shift = shift_of(a.page);
  reach.capacity = a.capacity;
  return reach;
}

}  // namespace ks
