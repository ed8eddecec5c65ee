// Tensor cores and asynchronous copies (sm_80 and later), on the host emulated by host/mma.cpp.
//
// A warp holds matrices in fragments; with g = lane / 4 and t = lane % 4 (PTX ISA, "Matrix
// fragments for mma.m16n8k16"), a register of two values holds
//   a [16, 16]:  a[0] row g, a[1] row g + 8, both columns 2t, 2t + 1; a[2], a[3] eight columns on
//   b [16, 8]:   b0 rows 2t, 2t + 1 of column g; b1 eight rows on
//   d [16, 8]:   d[0], d[1] row g, columns 2t, 2t + 1; d[2], d[3] row g + 8
#pragma once
#include "vector.h"

namespace bertfast::cuda {

#ifdef __CUDACC__

__device__ __forceinline__ unsigned shared_address(const void* p) {
  return unsigned(__cvta_generic_to_shared(p));
}

// d += a b, sums in fp32.
__device__ __forceinline__ void mma(bf16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma(fp16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same on fp32 values whose low 13 bits are zero (TF32), k = 8: a[0], a[1] rows g, g + 8 of
// column t, a[2], a[3] four columns on; b0 row t of column g, b1 four rows on.
__device__ __forceinline__ void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices of 2-byte values; lane i gives the address of row i % 8 of matrix i / 8, and
// gets from matrix m the values (g, 2t) and (g, 2t + 1), transposed (2t, g) and (2t + 1, g).
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// 16 bytes from global to shared memory, zeros unless valid; done after its group's wait.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void close_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Until at most `pending` of this thread's groups are under way; __syncthreads shows the others'.
template <int pending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

#else

void mma(bf16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
void mma(fp16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
void ldmatrix(uint32_t (&r)[4], const void* row);
void ldmatrix_transposed(uint32_t (&r)[4], const void* row);

inline void copy_async(void* to, const void* from, bool valid) {
  host::copy_later(to, valid ? from : nullptr, 16);
}
inline void close_copies() { host::close_group(); }
template <int pending>
void wait_copies() {
  host::finish_groups(pending);
}

#endif

// Two values in one register of a fragment, the first in the low half.
__device__ __forceinline__ uint32_t pair(bf16, float x, float y) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(x, y);
  return reinterpret_cast<const uint32_t&>(v);
}
__device__ __forceinline__ uint32_t pair(fp16, float x, float y) {
  const __half2 v = __floats2half2_rn(x, y);
  return reinterpret_cast<const uint32_t&>(v);
}
template <class T>
__device__ __forceinline__ float2 both(T, uint32_t v) {
  const T* at = reinterpret_cast<const T*>(&v);
  return {to_float(at[0]), to_float(at[1])};
}

}  // namespace bertfast::cuda
