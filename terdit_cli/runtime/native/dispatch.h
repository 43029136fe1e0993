// The choice of the instruction set.
#ifndef TERDIT_DISPATCH_H
#define TERDIT_DISPATCH_H

#include "kernels.h"

// The table in use: the best that the CPU can run, until terdit_set_isa selects another.
const Kernels *active_kernels();

#endif
