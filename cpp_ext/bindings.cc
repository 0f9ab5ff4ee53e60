// lamella_engine._kernels: checks every length, lets go of the GIL, calls the active variant.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <variant>
#include <vector>

#include "floats.hpp"
#include "kernels.hpp"
#include "rans.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using lamella::Kind;

// noconvert() stands on every one of these arguments: without it a strided array would be copied, and an output
// written to the copy.
using Bytes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Out = nb::ndarray<std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Planes = nb::ndarray<std::uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Table = nb::ndarray<const double, nb::shape<256>, nb::c_contig, nb::device::cpu>;

void require(bool holds, const char* message) {
    if (!holds) throw nb::value_error(message);
}

void require_width(std::size_t width) {
    require(width == 1 || width == 2 || width == 4 || width == 8, "width must be 1, 2, 4 or 8");
}

void require_planes(std::size_t nbytes, const Planes& planes) {
    require_width(planes.shape(0));
    require(planes.shape(0) * planes.shape(1) == nbytes, "planes must hold as many bytes as src");
}

struct PlanePointers {
    const std::uint8_t* data[8];
    std::size_t n;
    std::size_t width;
};

PlanePointers pointers(const std::vector<Bytes>& planes, const Out& out) {
    require_width(planes.size());
    PlanePointers found{{}, planes[0].size(), planes.size()};
    for (std::size_t p = 0; p < planes.size(); ++p) {
        require(planes[p].size() == found.n, "planes must have one length");
        found.data[p] = planes[p].data();
    }
    require(found.n * found.width == out.size(), "out must hold as many bytes as the planes");
    return found;
}

void split_planes(Bytes src, Planes planes) {
    require_planes(src.size(), planes);
    nb::gil_scoped_release release;
    lamella::active().split_planes(src.data(), planes.shape(1), planes.shape(0), planes.data());
}

void xor_split(Bytes src, Bytes base, Planes planes) {
    require_planes(src.size(), planes);
    require(src.size() == base.size(), "base must be as long as src");
    nb::gil_scoped_release release;
    lamella::active().xor_split(src.data(), base.data(), planes.shape(1), planes.shape(0), planes.data());
}

void residual_split(Bytes src, Bytes base, Planes planes) {
    require_planes(src.size(), planes);
    require(src.size() == base.size(), "base must be as long as src");
    nb::gil_scoped_release release;
    lamella::active().residual_split(src.data(), base.data(), planes.shape(1), planes.shape(0), planes.data());
}

void merge_planes(const std::vector<Bytes>& planes, Out out) {
    const PlanePointers from = pointers(planes, out);
    nb::gil_scoped_release release;
    lamella::active().merge_planes(from.data, from.n, from.width, out.data());
}

void xor_merge(const std::vector<Bytes>& planes, Bytes base, Out out) {
    const PlanePointers from = pointers(planes, out);
    require(base.size() == out.size(), "base must be as long as out");
    nb::gil_scoped_release release;
    lamella::active().xor_merge(from.data, base.data(), from.n, from.width, out.data());
}

void residual_merge(const std::vector<Bytes>& planes, Bytes base, Out out) {
    const PlanePointers from = pointers(planes, out);
    require(base.size() == out.size(), "base must be as long as out");
    nb::gil_scoped_release release;
    lamella::active().residual_merge(from.data, base.data(), from.n, from.width, out.data());
}

std::size_t lanes(std::size_t nbytes, std::size_t width) {
    require_width(width);
    require(nbytes % width == 0, "out must be whole lanes");
    require(nbytes <= 4u << 20, "out must be at most 4 MiB");
    return nbytes / width;
}

std::size_t coder_workspace(std::size_t nbytes, std::size_t width) {
    const std::size_t n = lanes(nbytes, width);
    return std::max({lamella::rans::encoder_workspace(n, width), lamella::rans::decoder_workspace(n),
                     lamella::floats::encoder_workspace(n, width), lamella::floats::decoder_workspace(n)});
}

std::size_t residual_encode(Bytes src, Bytes base, std::size_t width, Out workspace, Out out) {
    const std::size_t n = lanes(src.size(), width);
    require(src.size() == base.size(), "base must be as long as src");
    require(n != 0, "src must not be empty");
    require(workspace.size() >= lamella::rans::encoder_workspace(n, width), "workspace must be large enough");
    nb::gil_scoped_release release;
    return lamella::rans::encode(*lamella::active().coder, src.data(), base.data(), n, width, workspace.data(),
                                 out.data(), out.size());
}

std::optional<const char*> residual_decode(Bytes payload, Bytes base, std::size_t width, Out workspace, Out out) {
    const std::size_t n = lanes(out.size(), width);
    require(base.size() == out.size(), "base must be as long as out");
    require(n != 0, "out must not be empty");
    require(workspace.size() >= lamella::rans::decoder_workspace(n), "workspace must be large enough");
    nb::gil_scoped_release release;
    return lamella::rans::decode(*lamella::active().coder, payload.data(), payload.size(), base.data(), n, width,
                                 workspace.data(), out.data());
}

void cast(Bytes src, lamella::Cast how, Out out) {
    const std::size_t n = src.size() / lamella::source_width(how);
    require(src.size() == n * lamella::source_width(how), "src must be whole lanes");
    require(out.size() == n * lamella::target_width(how), "out must have as many lanes as src");
    nb::gil_scoped_release release;
    lamella::cast(src.data(), n, how, out.data());
}

const std::uint8_t* guide_of(const std::optional<Bytes>& guide, std::size_t nbytes) {
    require(!guide || guide->size() == nbytes, "guide must be as long as the lanes");
    return guide ? guide->data() : nullptr;
}

std::size_t float_encode(Bytes src, std::optional<Bytes> guide, std::size_t width, Out workspace, Out out) {
    const std::size_t n = lanes(src.size(), width);
    const std::uint8_t* guiding = guide_of(guide, src.size());
    require(n != 0, "src must not be empty");
    require(workspace.size() >= lamella::floats::encoder_workspace(n, width), "workspace must be large enough");
    nb::gil_scoped_release release;
    return lamella::floats::encode(*lamella::active().float_coder, src.data(), guiding, n, width, workspace.data(),
                                   out.data(), out.size());
}

std::optional<const char*> float_decode(Bytes payload, std::optional<Bytes> guide, std::size_t width, Out workspace,
                                        Out out) {
    const std::size_t n = lanes(out.size(), width);
    const std::uint8_t* guiding = guide_of(guide, out.size());
    require(n != 0, "out must not be empty");
    require(workspace.size() >= lamella::floats::decoder_workspace(n), "workspace must be large enough");
    nb::gil_scoped_release release;
    return lamella::floats::decode(*lamella::active().float_coder, payload.data(), payload.size(), guiding, n, width,
                                   workspace.data(), out.data());
}

void require_singles(std::size_t nbytes, const Bytes& decayed, const Out& out) {
    require(nbytes % 4 == 0, "lanes must be of four bytes");
    require(decayed.size() == nbytes && out.size() == nbytes, "all must be of one length");
}

void decay(Bytes base, std::uint32_t factor, unsigned halvings, Out out) {
    require_singles(base.size(), base, out);
    require(factor >> 31 != 0, "factor must be at least 2^31");
    require(halvings < 8, "halvings must be less than 8");
    nb::gil_scoped_release release;
    lamella::decay(base.data(), base.size() / 4, factor, halvings, out.data());
}

void decay_fold(Bytes src, Bytes decayed, Out out) {
    require_singles(src.size(), decayed, out);
    nb::gil_scoped_release release;
    lamella::decay_fold(src.data(), decayed.data(), src.size() / 4, out.data());
}

void decay_unfold(Bytes folded, Bytes decayed, Out out) {
    require_singles(folded.size(), decayed, out);
    nb::gil_scoped_release release;
    lamella::decay_unfold(folded.data(), decayed.data(), folded.size() / 4, out.data());
}

bool is_constant(Bytes src, std::size_t width) {
    require(width != 0 && src.size() % width == 0, "src must be whole lanes");
    nb::gil_scoped_release release;
    return lamella::is_constant(src.data(), src.size(), width);
}

using MomentsTuple = std::tuple<std::size_t, std::uint64_t, double, double, double, double, double, double>;

const double* require_elements(std::size_t nbytes, Kind kind, const std::optional<Table>& table) {
    require(nbytes % lamella::element_width(kind) == 0, "a must be whole elements");
    require((kind == Kind::table8) == table.has_value(), "a table goes with TABLE8 and with nothing else");
    return table ? table->data() : nullptr;
}

MomentsTuple as_tuple(std::size_t count, const lamella::PartialSums& sums) {
    const lamella::Moments m = lamella::finish(sums);
    return {count, m.changed,   m.squared_difference, m.absolute_difference, m.largest_difference,
            m.dot, m.squared_a, m.squared_b};
}

MomentsTuple moments(Bytes a, Bytes b, Kind kind, std::optional<Table> table) {
    require(a.size() == b.size(), "a and b must be of one length");
    const double* values = require_elements(a.size(), kind, table);
    const std::size_t count = a.size() / lamella::element_width(kind);
    lamella::PartialSums sums = {};
    {
        nb::gil_scoped_release release;
        lamella::active().add_moments(a.data(), b.data(), count, kind, values, sums);
    }
    return as_tuple(count, sums);
}

std::variant<MomentsTuple, const char*> residual_moments(Bytes a, Bytes payload, Bytes base, std::size_t width,
                                                         Out workspace, Kind kind, std::optional<Table> table) {
    const std::size_t n = lanes(a.size(), width);
    require(a.size() == base.size(), "base must be as long as a");
    require(n != 0, "a must not be empty");
    require(workspace.size() >= lamella::rans::decoder_workspace(n), "workspace must be large enough");
    const double* values = require_elements(a.size(), kind, table);
    lamella::PartialSums sums = {};
    const char* fault;
    {
        nb::gil_scoped_release release;
        fault = lamella::rans::add_moments(lamella::active(), payload.data(), payload.size(), base.data(), a.data(), n,
                                           width, kind, values, workspace.data(), sums);
    }
    if (fault != nullptr) return fault;
    return as_tuple(a.size() / lamella::element_width(kind), sums);
}

}  // namespace

NB_MODULE(_kernels, m) {
    m.doc() = "Per-chunk loops. cpp_ext/kernels.hpp defines each; all of them let go of the GIL.";

    nb::enum_<Kind>(m, "Kind", "What a lane is to moments.")
        .value("TABLE8", Kind::table8)
        .value("INT16", Kind::int16)
        .value("UINT16", Kind::uint16)
        .value("INT32", Kind::int32)
        .value("UINT32", Kind::uint32)
        .value("INT64", Kind::int64)
        .value("UINT64", Kind::uint64)
        .value("FLOAT16", Kind::float16)
        .value("BFLOAT16", Kind::bfloat16)
        .value("FLOAT32", Kind::float32)
        .value("FLOAT64", Kind::float64)
        .value("COMPLEX64", Kind::complex64)
        .value("COMPLEX128", Kind::complex128);

    nb::enum_<lamella::Cast>(m, "Cast", "A conversion between floats.")
        .value("FLOAT32_TO_BFLOAT16", lamella::Cast::float32_to_bfloat16)
        .value("FLOAT32_TO_FLOAT16", lamella::Cast::float32_to_float16)
        .value("BFLOAT16_TO_FLOAT32", lamella::Cast::bfloat16_to_float32)
        .value("FLOAT16_TO_FLOAT32", lamella::Cast::float16_to_float32);

    m.def("isa", [] { return lamella::active().isa; }, "Name of the variant in use: \"avx2\" or \"scalar\".");
    m.def(
        "set_isa", [](const char* isa) { require(lamella::select(isa), "this build or CPU has no such variant"); },
        "isa"_a, "Use this variant from now on, in all threads; they differ in speed only. Raises ValueError.");

    m.def("split_planes", split_planes, "src"_a.noconvert(), "planes"_a.noconvert(),
          "planes[p, i] = byte p of lane i of src; planes is (width, lanes).");
    m.def("xor_split", xor_split, "src"_a.noconvert(), "base"_a.noconvert(), "planes"_a.noconvert(),
          "split_planes of src ^ base.");
    m.def("residual_split", residual_split, "src"_a.noconvert(), "base"_a.noconvert(), "planes"_a.noconvert(),
          "split_planes of the residual of src against base.");
    m.def("merge_planes", merge_planes, "planes"_a.noconvert(), "out"_a.noconvert(),
          "Inverse of split_planes; 1, 2, 4 or 8 planes, which may lie apart.");
    m.def("xor_merge", xor_merge, "planes"_a.noconvert(), "base"_a.noconvert(), "out"_a.noconvert(),
          "Inverse of xor_split.");
    m.def("residual_merge", residual_merge, "planes"_a.noconvert(), "base"_a.noconvert(), "out"_a.noconvert(),
          "Inverse of residual_split.");

    m.def("coder_workspace", coder_workspace, "nbytes"_a, "width"_a,
          "Bytes of workspace that the coders below take for chunks of up to nbytes.");
    m.def("residual_encode", residual_encode, "src"_a.noconvert(), "base"_a.noconvert(), "width"_a,
          "workspace"_a.noconvert(), "out"_a.noconvert(),
          "Write the RESIDUAL_RANS payload of src to the front of out; return its bytes, or 0 if out is too short.");
    m.def("residual_decode", residual_decode, "payload"_a.noconvert(), "base"_a.noconvert(), "width"_a,
          "workspace"_a.noconvert(), "out"_a.noconvert(),
          "Inverse of residual_encode. Return None, or what is wrong with the payload: then out is undefined.");

    m.def("cast", cast, "src"_a.noconvert(), "how"_a, "out"_a.noconvert(), "Convert lanes, each to one lane of out.");
    m.def(
        "float_encode", float_encode, "src"_a.noconvert(), "guide"_a.noconvert().none(), "width"_a,
        "workspace"_a.noconvert(), "out"_a.noconvert(),
        "Write the FLOAT_RANS payload of src, or GUIDED_RANS with a guide, to the front of out; return its bytes, or 0"
        " if out is too short.");
    m.def("float_decode", float_decode, "payload"_a.noconvert(), "guide"_a.noconvert().none(), "width"_a,
          "workspace"_a.noconvert(), "out"_a.noconvert(),
          "Inverse of float_encode. Return None, or what is wrong with the payload: then out is undefined.");

    m.def("decay", decay, "base"_a.noconvert(), "factor"_a, "halvings"_a, "out"_a.noconvert(),
          "out = base * factor / 2^(32 + halvings), lanes being float32.");
    m.def("decay_fold", decay_fold, "src"_a.noconvert(), "decayed"_a.noconvert(), "out"_a.noconvert(),
          "Move lanes that are above a decayed base such that their residuals have no sign.");
    m.def("decay_unfold", decay_unfold, "folded"_a.noconvert(), "decayed"_a.noconvert(), "out"_a.noconvert(),
          "Inverse of decay_fold; out may be folded.");

    m.def("is_constant", is_constant, "src"_a.noconvert(), "width"_a, "Whether all lanes of src are equal.");
    m.def("moments", moments, "a"_a.noconvert(), "b"_a.noconvert(), "kind"_a, "table"_a.noconvert() = nb::none(),
          "Return (count, changed, sum (a-b)^2, sum |a-b|, max |a-b|, sum ab, sum a^2, sum b^2).");
    m.def("residual_moments", residual_moments, "a"_a.noconvert(), "payload"_a.noconvert(), "base"_a.noconvert(),
          "width"_a, "workspace"_a.noconvert(), "kind"_a, "table"_a.noconvert() = nb::none(),
          "Return moments of a and of what residual_decode gives, or what is wrong with the payload.");
}
