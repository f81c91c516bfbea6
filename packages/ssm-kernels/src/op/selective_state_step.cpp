// The front of the step: checks once, then hands the kernel the shapes of Mamba-2 with a token
// axis: state (R, H, P, N), x, dt, z, y (B, T, H, P), A (H, P, N), B and C (B, T, G, N), D and
// dt_bias (H, P).
#include <ssm/selective_state_step.h>

#include <numeric>

#include "check.h"
#include "cuda_kernels.h"
#include "isa.h"

SSM_CPU_KERNEL(selective_state_step_fwd, const SelectiveStateStepArgs&, int)

namespace ssm {

namespace {

constexpr const char* kOp = "selective_state_step";

// One permitted shape. A negative size is free; it holds the negated letter of its axis.
struct Form {
    const char* letters;
    int ndim;
    std::int64_t sizes[4];

    bool fits(const TensorView& view) const {
        if (view.ndim != ndim) return false;
        for (int i = 0; i < ndim; ++i)
            if (sizes[i] >= 0 && sizes[i] != view.shape[i]) return false;
        return true;
    }
    /// The letters, and the sizes where any is fixed. A free size stands as what was got, or, in a
    /// shape of another rank, as its letter; the least group count is 1.
    std::string text(const TensorView& view) const {
        std::string named, sizes_text;
        named.append("(").append(letters);
        bool any_fixed = false;
        for (int i = 0; i < ndim; ++i) {
            if (i > 0) sizes_text += ", ";
            any_fixed = any_fixed || sizes[i] >= 0;
            if (sizes[i] >= 0)
                sizes_text += std::to_string(sizes[i]);
            else if (view.ndim == ndim)
                sizes_text += std::to_string(view.shape[i]);
            else
                sizes_text += sizes[i] == -'G' ? '1' : static_cast<char>(-sizes[i]);
        }
        if (any_fixed) named.append(") = (").append(sizes_text).append(ndim == 1 ? "," : "");
        return named + ")";
    }
};

class StepChecker : public Checker {
  public:
    using Checker::Checker;

    /// A floating tensor of one of the shapes. Text is only put together for a refusal: a step is
    /// short enough to feel it.
    void one_of(std::string_view name, const TensorView& view, std::initializer_list<Form> forms) {
        given(name, view);
        // The sentence shows the last form of the tensor's rank, else the last, most general one.
        const Form* shown = forms.end() - 1;
        for (const Form& form : forms) {
            if (form.fits(view)) {
                floating(name, view);
                device(name, view);
                return;
            }
            if (form.ndim == view.ndim) shown = &form;
        }
        fail(name, "have shape " + shown->text(view), shape_text(view));
    }
    void optional_one_of(std::string_view name, const TensorView& view,
                         std::initializer_list<Form> forms) {
        if (present(view)) one_of(name, view, forms);
    }
};

void insert_axis(TensorView& view, int axis, std::int64_t size) {
    if (!present(view)) return;
    for (int i = view.ndim; i > axis; --i) {
        view.shape[i] = view.shape[i - 1];
        view.stride[i] = view.stride[i - 1];
    }
    view.shape[axis] = size;
    view.stride[axis] = 0;
    ++view.ndim;
}

// Channels (D) as (H, P).
void split_axis(TensorView& view, int axis, std::int64_t heads) {
    if (!present(view)) return;
    insert_axis(view, axis, heads);
    view.shape[axis + 1] /= heads;
    view.stride[axis] = view.shape[axis + 1] * view.stride[axis + 1];
}

std::int64_t group_count(const TensorView& matrix, bool has_group, int axis) {
    return has_group ? matrix.shape[axis] : 1;
}

SelectiveStateStepArgs check_and_canonicalise(const SelectiveStateStepArgs& given) {
    SelectiveStateStepArgs args = given;
    StepChecker check(kOp, args.state.device);
    check.one_of("state", args.state,
                 {{"R, D, N", 3, {-'R', -'D', -'N'}}, {"R, H, P, N", 4, {-'R', -'H', -'P', -'N'}}});
    check.written("state", args.state);
    const bool has_heads = args.state.ndim == 4, several = args.x.ndim == args.state.ndim;
    const std::int64_t heads = args.state.shape[1];  // D for Mamba-1
    const std::int64_t headdim = args.state.shape[2];
    const std::int64_t dstate = args.state.shape[args.state.ndim - 1];
    if (has_heads)
        check.one_of("x", args.x,
                     {{"B, H, P", 3, {-'B', heads, headdim}},
                      {"B, T, H, P", 4, {-'B', -'T', heads, headdim}}});
    else
        check.one_of("x", args.x,
                     {{"B, D", 2, {-'B', heads}}, {"B, T, D", 3, {-'B', -'T', heads}}});
    const std::int64_t batch = args.x.shape[0], tokens = several ? args.x.shape[1] : 1;

    const Form like_x = !several
                            ? (has_heads ? Form{"B, H, P", 3, {batch, heads, headdim}}
                                         : Form{"B, D", 2, {batch, heads}})
                            : (has_heads ? Form{"B, T, H, P", 4, {batch, tokens, heads, headdim}}
                                         : Form{"B, T, D", 3, {batch, tokens, heads}});
    const Form per_head =
        several ? Form{"B, T, H", 3, {batch, tokens, heads}} : Form{"B, H", 2, {batch, heads}};
    const Form matrix =
        several ? Form{"B, T, N", 3, {batch, tokens, dstate}} : Form{"B, N", 2, {batch, dstate}};
    const Form grouped = several ? Form{"B, T, G, N", 4, {batch, tokens, -'G', dstate}}
                                 : Form{"B, G, N", 3, {batch, -'G', dstate}};
    const Form weight = has_heads ? Form{"H,", 1, {heads}} : Form{"D,", 1, {heads}};
    const Form full_weight{"H, P", 2, {heads, headdim}};

    if (has_heads) {
        check.one_of("dt", args.dt, {per_head, like_x});
        check.one_of("A", args.A, {{"H,", 1, {heads}}, {"H, P, N", 3, {heads, headdim, dstate}}});
    } else {
        check.one_of("dt", args.dt, {like_x});
        check.one_of("A", args.A, {{"D, N", 2, {heads, dstate}}});
    }
    const auto check_matrix = [&](const char* name, const TensorView& view) {
        check.one_of(name, view, {matrix, grouped});
        const std::int64_t groups = group_count(view, view.ndim == grouped.ndim, grouped.ndim - 2);
        if (groups < 1 || heads % groups != 0)
            check.fail(name,
                       std::string("have a group count that divides ") + (has_heads ? "H" : "D") +
                           " = " + std::to_string(heads),
                       std::to_string(groups));
        return groups;
    };
    const std::int64_t b_groups = check_matrix("B", args.B), c_groups = check_matrix("C", args.C);
    if (has_heads) {
        check.optional_one_of("D", args.D, {weight, full_weight});
        check.optional_one_of("z", args.z, {like_x});
        check.optional_one_of("dt_bias", args.dt_bias, {weight, full_weight});
    } else {
        check.optional_one_of("D", args.D, {weight});
        check.optional_one_of("z", args.z, {like_x});
        check.optional_one_of("dt_bias", args.dt_bias, {weight});
    }
    if (present(args.state_indices))
        check.state_indices(args.state_indices, batch, args.state.shape[0]);
    else if (args.state.shape[0] != batch)
        check.fail("state", "have B = " + std::to_string(batch) + " rows without state_indices",
                   std::to_string(args.state.shape[0]));
    check.one_of("y", args.y, {like_x});
    check.written("y", args.y);

    // From here on every view has the shape that the head of this file lists.
    if (args.B.ndim == matrix.ndim) insert_axis(args.B, matrix.ndim - 1, 1);
    if (args.C.ndim == matrix.ndim) insert_axis(args.C, matrix.ndim - 1, 1);
    if (!several)
        for (TensorView* view : {&args.x, &args.dt, &args.z, &args.y, &args.B, &args.C})
            insert_axis(*view, 1, 1);
    if (has_heads) {
        if (args.dt.ndim == 3) insert_axis(args.dt, 3, headdim);
        if (args.A.ndim == 1) {
            insert_axis(args.A, 1, headdim);
            insert_axis(args.A, 2, dstate);
        }
        for (TensorView* view : {&args.D, &args.dt_bias})
            if (view->ndim == 1) insert_axis(*view, 1, headdim);
    } else {
        // Channels that share B and C become one head.
        const std::int64_t shared = std::lcm(b_groups, c_groups);
        for (TensorView* view : {&args.x, &args.dt, &args.z, &args.y}) split_axis(*view, 2, shared);
        for (TensorView* view : {&args.A, &args.D, &args.dt_bias}) split_axis(*view, 0, shared);
        split_axis(args.state, 1, shared);
    }
    return args;
}

}  // namespace

void selective_state_step_fwd(const SelectiveStateStepArgs& given, const Exec& exec) {
    const SelectiveStateStepArgs args = check_and_canonicalise(given);
    if (const auto* gpu = cuda_kernels(kOp, args.state.device))
        return gpu->selective_state_step_fwd(args, exec);
    cpu::selective_state_step_fwd.active()(args, thread_count(exec));
}

}  // namespace ssm
