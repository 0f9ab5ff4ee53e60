#include <atomic>
#include <cstdlib>
#include <cstring>

#include "kernels.hpp"

namespace lamella {
namespace {

const Kernels* find(const char* isa) noexcept {
#ifdef LAMELLA_HAVE_AVX2
    if (std::strcmp(isa, "avx2") == 0) {
        __builtin_cpu_init();
        const bool runs =
            __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("popcnt");
        return runs ? &avx2_kernels : nullptr;
    }
#endif
    return std::strcmp(isa, "scalar") == 0 ? &scalar_kernels : nullptr;
}

const Kernels* fastest() noexcept {
    const char* forced = std::getenv("LAMELLA_ISA");
    if (forced != nullptr && std::strcmp(forced, "scalar") == 0) return &scalar_kernels;
    const Kernels* avx2 = find("avx2");
    return avx2 != nullptr ? avx2 : &scalar_kernels;
}

std::atomic<const Kernels*>& table() noexcept {
    static std::atomic<const Kernels*> current{fastest()};
    return current;
}

}  // namespace

const Kernels& active() noexcept { return *table().load(std::memory_order_relaxed); }

bool select(const char* isa) noexcept {
    const Kernels* found = find(isa);
    if (found != nullptr) table().store(found, std::memory_order_relaxed);
    return found != nullptr;
}

}  // namespace lamella
