#include "capability.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace dynaprune::cpu {
namespace {

#if defined(__aarch64__)
constexpr const char* kGenericName = "neon";
#else
constexpr const char* kGenericName = "generic";
#endif

Capability detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512) return Capability::avx512;
  if (avx2) return Capability::avx2;
#endif
  return Capability::generic;
}

const char* name_of(Capability capability) {
  return capability == Capability::avx512 ? "avx512" : capability == Capability::avx2 ? "avx2" : kGenericName;
}

Capability choose() {
  const Capability best = detect();
  const char* forced = std::getenv("DYNAPRUNE_CPU_CAPABILITY");
  if (forced == nullptr || *forced == '\0') return best;
  for (Capability capability : {Capability::generic, Capability::avx2, Capability::avx512})
    if (std::string(forced) == name_of(capability) && capability <= best) return capability;
  throw std::runtime_error(std::string("DYNAPRUNE_CPU_CAPABILITY: expected one of avx512, avx2, ") + kGenericName +
                           " that this CPU has (its best is " + name_of(best) + "), got " + forced);
}

}  // namespace

Capability capability() {
  static const Capability chosen = choose();
  return chosen;
}

const char* capability_name() { return name_of(capability()); }

const Kernels& kernels() {
#if defined(__x86_64__)
  if (capability() == Capability::avx512) return avx512::kernels;
  if (capability() == Capability::avx2) return avx2::kernels;
#endif
  return generic::kernels;
}

}  // namespace dynaprune::cpu
