// Force-included when a wheel is built (TERDIT_OLD_GLIBC). glibc 2.32 and 2.34 moved these functions
// from libpthread to libc and gave their symbols a new version, to which a library built today
// would be bound; the older versions still exist. torch itself needs glibc 2.28, so a wheel
// should need no more. `make wheel` fails if a function is missing here.
#ifndef TERDIT_GLIBC_H
#define TERDIT_GLIBC_H

#if defined(__x86_64__)
#define TERDIT_OLD(name) __asm__(".symver " #name ", " #name "@GLIBC_2.2.5")
#elif defined(__aarch64__)
#define TERDIT_OLD(name) __asm__(".symver " #name ", " #name "@GLIBC_2.17")
#endif

TERDIT_OLD(pthread_create);
TERDIT_OLD(pthread_detach);
TERDIT_OLD(pthread_once);
TERDIT_OLD(pthread_sigmask);

#endif
