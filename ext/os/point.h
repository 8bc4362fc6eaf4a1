/* point.h - named points at which a test can kill, stop or detach a participant.
 *
 * A point bears the label of the protocol's step (ARCHITECTURE.md) and stands
 * in the middle of it: what the step stores is partly there.  Built in with
 * -DPS_POINTS only; PYSHARE_POINT=LABEL=ACTION[@N] chooses one, read once per
 * process (at the first region, and in a forked child): at its N-th passage
 * (1 if not given) `kill` and `stop` send that signal to the process, `exit`
 * ends the thread alone.
 */
#ifndef PS_POINT_H
#define PS_POINT_H

#ifdef PS_POINTS
void ps_point_hit(const char *label);
void ps_point_reload(void);
#define PS_POINT(label) ps_point_hit(#label)
#define PS_POINT_RELOAD() ps_point_reload()
#else
#define PS_POINT(label) ((void)0)
#define PS_POINT_RELOAD() ((void)0)
#endif

#endif
