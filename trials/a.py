from proto import *
# trunk of 2, 40 %; then 4 clusters vs random
share=0.4; n1=TOTAL*share/p1_cost(2); n2=TOTAL*(1-share)/part_cost(2,2)/4
print(n1,n2,flush=True)
f='/tmp/q19/trunk2.pt'
half=int(n1//64)+64
if not os.path.exists(f):
    p=phase1(2,n1,2e-3,perm[:half]); torch.save(p,f)
p=torch.load(f,weights_only=False); tr=Trunk([p]); log(what='trunk2 alone',share=share,nats=nats1(tr,p))
X=pooled(tr,perm); cb=kmeans(X[:60000],4); a=assign(X,cb); doms=np.load('/tmp/q19/train.npz')['D'][perm]
for j in range(4): print(j,(a==j).sum(),np.bincount(doms[a==j],minlength=7)/1e3)
idx=[perm[half:][a[half:]==j] for j in range(4)]; print([len(i)*64/1e6 for i in idx],n2/1e6,flush=True)
idx=[i if len(i)*64>n2+4096 else np.concatenate([i,perm[:half][a[:half]==j]]) for j,i in enumerate(idx)]
r=router(tr,perm,a,4); torch.save(r,'/tmp/q19/router2.pt')
parts=[]
for j in range(4):
    q=f'/tmp/q19/t2_cluster{j}.pt'
    if not os.path.exists(q): torch.save(part_on(tr,2,n2,2e-3,idx[j],seed=10+j,name=f'cluster{j}'),q)
    parts.append(torch.load(q,weights_only=False))
log(what='trunk2 + 4 clusters of 2',**ensemble(tr,parts,r))
