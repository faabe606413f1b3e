// Codes of tokens from the planes of their bits.
#include "tables.h"

#include "codes_vec.h"

namespace ks {
namespace KS_ISA {
namespace {

typedef uint16_t Tokens __attribute__((vector_size(32)));  // 16 of them; two registers where those are narrower

void codes(const int32_t* planes, const int32_t* columns, int64_t bits, uint16_t* to) {
  const Tokens place = {1,   1 << 1, 1 << 2,  1 << 3,  1 << 4,  1 << 5,  1 << 6,  1 << 7,
                        256, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};
  for (int64_t part = 0; part < UNIT / 16; part++) {
    Tokens code = {};
    for (int64_t b = 0; b < bits; b++) {
      const uint16_t bit = uint16_t(1u << b);
      uint16_t word;
      std::memcpy(&word, reinterpret_cast<const char*>(planes + columns[b] * WORDS) + 2 * part, 2);
      const Tokens held = (Tokens)(((Tokens{} + word) & place) == place);
      code |= held & (Tokens{} + bit);
    }
    std::memcpy(to + part * 16, &code, sizeof code);
  }
}

}  // namespace
}  // namespace KS_ISA

KS_DEFINE_TABLE(TablesKernels, tables) = {KS_ISA::codes};

}  // namespace ks
