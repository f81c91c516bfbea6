// The CUDA kernels compiled for the host: what tests load in place of the extension module _cuda.
#include "kernels.h"
#include "launch.cuh"
#include "tile_gemm.cuh"

namespace ssm::cuda {

namespace {

/// A kernel that does wrong, in one of the ways that the host must see.
struct Wrong {
    static constexpr int kThreads = 32;
    static constexpr int kBlocksPerUnit = 1;
    struct Registers {};
    enum Kind { kNothing, kReadRace, kWriteRace, kUnwritten, kOutside } kind;

    std::int64_t shared_size() const { return kThreads; }

    template <class Block>
    void operator()(Block& block, std::int64_t) const {
        if (kind != kUnwritten) block.each([&](int thread, Registers&) { block.write(thread, 1); });
        if (kind != kReadRace) block.barrier();
        const int step = kind == kOutside ? kThreads : 1;
        block.each([&](int thread, Registers&) {
            block.read(thread + step < kThreads || kind == kOutside ? thread + step : 0);
        });
        if (kind != kWriteRace) block.barrier();
        block.each([&](int thread, Registers&) { block.write(thread, 2); });
    }
};

/// The same for the memory of matrices.
struct WrongMatrix {
    static constexpr int kThreads = 64;
    static constexpr int kBlocksPerUnit = 1;
    using Element = Bf16;
    struct Registers {};
    enum Kind { kNothing, kOddRow, kOneBank, kNotCopied, kTouched, kUnwritten, kVote } kind;
    const Bf16* from;

    std::int64_t shared_size() const { return 0; }
    std::int64_t matrix_size() const { return 512; }

    template <class Block>
    void operator()(Block& block, std::int64_t) const {
        block.vote([&](int thread) { return thread % 2 == 0 || (kind == kVote && thread == 33); });
        block.each([&](int thread, Registers&) {
            if (kind != kUnwritten) block.copy(thread * 8, from, true);
            if (kind == kTouched) block.write_element(thread * 8, {});
            if (kind != kNotCopied) block.wait_for_copies(thread);
        });
        block.barrier();
        block.each_warp([&](auto& warp) {
            PerLane<Fragment<Bf16>> found;
            const int stride = kind == kOddRow ? 12 : kind == kOneBank ? 64 : 8;
            warp.template load<false>([&](int lane) { return lane % 8 * stride; }, found);
        });
    }
};

/// The product of two matrices of 16 x 16 elements, each stored transposed or not, by one warp.
template <class Matter>
struct Product {
    static constexpr int kThreads = kWarp;
    static constexpr int kBlocksPerUnit = 1;
    using Element = Matter;
    struct Registers {};

    const double *left, *right;
    double* product;
    bool left_transposed, right_transposed;

    std::int64_t shared_size() const { return 0; }
    std::int64_t matrix_size() const { return 2 * 16 * matrix_stride(16); }

    template <class Block>
    void operator()(Block& block, std::int64_t) const {
        const Matrix a{0, matrix_stride(16)}, b{16 * a.stride, a.stride};
        block.each([&](int thread, Registers&) {
            for (int i = thread; i < 256; i += kThreads) {
                Element element;
                narrow(left[i], element);
                block.write_element(a.at(i / 16, i % 16), element);
                narrow(right[i], element);
                block.write_element(b.at(i / 16, i % 16), element);
            }
        });
        block.barrier();
        block.each_warp([&](auto& warp) {
            using Real = typename std::remove_reference_t<decltype(warp)>::Real;
            struct Sums {
                Real of[4];
            };
            PerLane<Fragment<Element>> A, B;
            left_transposed ? load_left<true>(warp, a, 0, 0, A) : load_left(warp, a, 0, 0, A);
            right_transposed ? load_right<true>(warp, b, 0, 0, B) : load_right(warp, b, 0, 0, B);
            for (int side = 0; side < 2; ++side) {
                PerLane<Sums> sums;
                multiply(warp, [&](int lane) -> Real(&)[4] { return sums(lane).of; }, A, B, side);
                warp.each([&](int lane, Registers&) {
                    for (int i = 0; i < 4; ++i)
                        product[(lane / 4 + i / 2 * 8) * 16 + side * 8 + lane % 4 * 2 + i % 2] =
                            sums(lane).of[i];
                });
            }
        });
    }
};

template <class Run>
const char* said_by(Run&& run) {
    static std::string said;
    said.clear();
    try {
        run();
    } catch (const std::logic_error& fault) {
        said = fault.what();
    }
    return said.c_str();
}

}  // namespace

}  // namespace ssm::cuda

extern "C" SSM_API const void* ssm_cuda_host_kernels() {
    static constexpr ssm::cuda::Kernels kernels = ssm::cuda::linked_kernels(ssm::DeviceType::cpu);
    return &kernels;
}

/// From now on a block has at most `bytes` of shared memory.
extern "C" SSM_API void ssm_cuda_host_set_shared(std::int64_t bytes) {
    ssm::cuda::shared_of_host = bytes;
}

/// What the host says of a kernel that does wrong; an empty text if nothing.
extern "C" SSM_API const char* ssm_cuda_host_fault(int kind) {
    return ssm::cuda::said_by([&] {
        const ssm::cuda::Wrong kernel{static_cast<ssm::cuda::Wrong::Kind>(kind)};
        ssm::cuda::launch<float>("wrong", kernel, 1, {}, {});
    });
}
extern "C" SSM_API const char* ssm_cuda_host_matrix_fault(int kind) {
    return ssm::cuda::said_by([&] {
        alignas(16) static const ssm::cuda::Bf16 zeros[8] = {};
        const ssm::cuda::WrongMatrix kernel{static_cast<ssm::cuda::WrongMatrix::Kind>(kind), zeros};
        ssm::cuda::launch<float>("wrong", kernel, 1, {}, {});
    });
}

/// product = left right (16, 16), with operands rounded to `dtype` and stored transposed or not.
extern "C" SSM_API const char* ssm_cuda_host_product(int dtype, const double* left,
                                                     const double* right, double* product,
                                                     bool left_transposed, bool right_transposed) {
    return ssm::cuda::said_by([&] {
        const auto run = [&](auto element, auto real) {
            const ssm::cuda::Product<decltype(element)> kernel{left, right, product,
                                                               left_transposed, right_transposed};
            ssm::cuda::launch<decltype(real)>("product", kernel, 1, {}, {});
        };
        ssm::cuda::with_memory_type(static_cast<ssm::DType>(dtype), [&](auto element) {
            using Element = decltype(element);
            if constexpr (std::is_same_v<Element, double>)
                run(element, double{});
            else
                run(element, float{});
        });
    });
}
