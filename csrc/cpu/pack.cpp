// Rows between the padded and the packed layout.
#include <cstring>

#include "operators.h"

namespace bertfast::BERTFAST_ISA {

void gather_rows(const char* x, const int64_t* rows, char* out, int64_t tokens, int64_t row_bytes) {
  if (row_bytes == 0) return;
#pragma omp parallel for schedule(static) if (tokens * row_bytes > (1 << 17))
  for (int64_t t = 0; t < tokens; ++t)
    std::memcpy(out + t * row_bytes, x + rows[t] * row_bytes, row_bytes);
}

void scatter_rows(const char* x, const int64_t* rows, char* out, int64_t tokens, int64_t out_rows,
                  int64_t row_bytes) {
#pragma omp parallel if (out_rows * row_bytes > (1 << 17))
  {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < out_rows; ++r) std::memset(out + r * row_bytes, 0, row_bytes);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tokens; ++t)
      std::memcpy(out + rows[t] * row_bytes, x + t * row_bytes, row_bytes);
  }
}

}  // namespace bertfast::BERTFAST_ISA
