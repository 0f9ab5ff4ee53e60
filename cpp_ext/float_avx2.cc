#include "floats.hpp"
namespace lamella::floats {
const Loops avx2_loops = scalar_loops;
}
