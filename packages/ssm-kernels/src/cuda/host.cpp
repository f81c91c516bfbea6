// What tests ask of the host as a GPU: kernels that do wrong, and single products.
#include "launch.cuh"
#include "warpgroup_gemm.cuh"

namespace ssm::cuda {

namespace {

/// A kernel that does wrong, in one of the ways that the host must see.
struct Wrong {
    static constexpr int kThreads = 32;
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

/// The product of a matrix of 64 x K by one of K x N by one warpgroup, twice, or one that is wrong.
template <class Matter, int kDepth, int kColumns, bool kRowsAreK, bool kLeftInRegisters>
struct WarpgroupProduct {
    static constexpr int kThreads = 2 * kWarpgroup;
    using HasProducts = void;
    using Element = Matter;
    struct Registers {
        float sums[kColumns / 8][4], others[kColumns / 8][4];
        Fragment<Element> left[kDepth / 16];
    };
    enum Kind {
        kNothing,
        kNoFence,
        kNoBarrier,
        kFenceBehindBarrier,
        kOtherGroup,
        kOverwritten,
        kOverwrittenInRace,
        kSumsTouched,
        kSumsReused,
        kNotWaited,
        kUnwritten
    } kind;

    const double *left, *right;  // as they lie: (64, K), and (N, K) or (K, N)
    double* product;

    static constexpr int kRight = 64 * kDepth;
    std::int64_t shared_size() const { return 0; }
    std::int64_t matrix_size() const { return kRight + kDepth * kColumns; }

    template <class Block>
    void operator()(Block& block, std::int64_t) const {
        const Swizzled a{0}, b{kRight};
        constexpr int kAcross = kRowsAreK ? kColumns : kDepth;
        const auto write = [&](int place, double value) {
            Element element;
            narrow(value, element);
            block.write_element(place, element);
        };
        block.each([&](int thread, Registers&) {
            for (int i = thread; i < 64 * kDepth; i += kThreads)
                write(a.at(i / kDepth, i % kDepth), left[i]);
            for (int i = thread; i < kDepth * kColumns && kind != kUnwritten; i += kThreads)
                write(b.at(i / kAcross, i % kAcross), right[i]);
            if (kind != kNoFence && kind != kFenceBehindBarrier) block.fence_for_products();
        });
        if (kind != kNoBarrier) block.barrier();
        if (kind == kFenceBehindBarrier)
            block.each([&](int, Registers&) { block.fence_for_products(); });
        block.each_warpgroup([&](auto& group) {
            if (group.index == 1) {
                // The other one writes something, behind a barrier of its own.
                group.barrier();
                if (kind == kOtherGroup)
                    group.each([&](int thread, Registers&) { write(kRight + thread, 0); });
                return;
            }
            multiply(block, group, a, b);
        });
        block.barrier();
    }

  private:
    template <class Block, class Group>
    void multiply(Block& block, Group& group, const Swizzled& a, const Swizzled& b) const {
        const auto sums = [&](int thread) -> auto& { return group.registers(thread).sums; };
        const auto others = [&](int thread) -> auto& { return group.registers(thread).others; };
        const auto begin = [&](bool add, auto&& to) {
            if constexpr (kLeftInRegisters)
                begin_product<kDepth, kRowsAreK>(
                    group, add, to,
                    [&](int thread, int k) { return group.registers(thread).left[k / 16]; }, b);
            else
                begin_product<kDepth, kRowsAreK>(group, add, to, a, b);
        };
        group.each_warp([&](auto& warp) {
            for (int k = 0; kLeftInRegisters && k < kDepth; k += 16)
                load_left(warp, a, warp.index * 16, k,
                          [&](int lane) -> auto& { return warp.registers(lane).left[k / 16]; });
        });
        begin(false, sums);
        if (kind == kOverwritten)
            group.each([&](int thread, Registers&) {
                if (thread == 0) block.write_element(b.at(3, 5), {});
            });
        if (kind == kSumsTouched)
            group.each([&](int thread, Registers& r) {
                if (thread == 77) r.sums[1][2] = 0;
            });
        if (kind == kSumsReused) begin(true, sums);
        begin(false, others);
        finish_products<1>(group, sums);
        if (kind == kOverwrittenInRace) {
            finish_products<0>(group, others);
            group.each([&](int thread, Registers&) {
                if (thread == 0) block.write_element(b.at(3, 5), {});
            });
        }
        begin(true, sums);
        if (kind == kNotWaited) return;
        finish_products<0>(group, sums);
        group.each([&](int thread, Registers& r) {
            for (int n = 0; n < kColumns / 8; ++n)
                for (int i = 0; i < 4; ++i) {
                    const int row = thread / kWarp * 16 + thread % kWarp / 4 + i / 2 * 8;
                    const int column = 8 * n + thread % 4 * 2 + i % 2;
                    product[row * kColumns + column] = r.sums[n][i] + r.others[n][i];
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

/// product = 3 left right (64, columns), by a warpgroup: operands rounded to bfloat16 or float16.
/// Does wrong if kind is not 0.
extern "C" SSM_API const char* ssm_cuda_host_warpgroup_product(
    bool bfloat16, int depth, int columns, bool rows_are_k, bool left_in_registers, int kind,
    const double* left, const double* right, double* product) {
    using namespace ssm::cuda;
    return said_by([&] {
        const auto run =
            [&]<class Element, int kDepth, int kColumns, bool kRowsAreK, bool kLeft>() {
                using Kernel = WarpgroupProduct<Element, kDepth, kColumns, kRowsAreK, kLeft>;
                launch<float>(
                    "product",
                    Kernel{static_cast<typename Kernel::Kind>(kind), left, right, product}, 1, {},
                    {});
            };
        // A swizzled matrix has 64 rows: those of the right one are k, or its columns.
        const auto with_type = [&]<class Element>() {
            const auto with_sizes = [&]<int kDepth, int kColumns, bool kRowsAreK>() {
                left_in_registers
                    ? run.template operator()<Element, kDepth, kColumns, kRowsAreK, true>()
                    : run.template operator()<Element, kDepth, kColumns, kRowsAreK, false>();
            };
            if (rows_are_k)
                columns == 64 ? with_sizes.template operator()<64, 64, true>()
                              : with_sizes.template operator()<64, 128, true>();
            else
                depth == 64 ? with_sizes.template operator()<64, 64, false>()
                            : with_sizes.template operator()<128, 64, false>();
        };
        bfloat16 ? with_type.template operator()<Bf16>() : with_type.template operator()<F16>();
    });
}

/// The element, counted from the begin of shared memory, that a product finds by a descriptor.
extern "C" SSM_API int ssm_cuda_host_element_by(std::uint64_t descriptor, bool rows_are_k,
                                                int other, int k) {
    return static_cast<int>(ssm::cuda::address_by(descriptor, rows_are_k, other, k) / 2);
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
