// Which instruction set the library runs on.
#ifndef TERDIT_DISPATCH_H
#define TERDIT_DISPATCH_H

#include "kernels.h"

// The table in use: the best that the CPU can run, until terdit_set_isa names another.
const Kernels *active_kernels();

#endif
